package outbound

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// program runs a server until the test ends and returns when it accepts connections at address.
func program(t *testing.T, address, name string, args ...string) {
	t.Helper()
	var output bytes.Buffer
	c := exec.Command(name, args...)
	c.Stdout, c.Stderr = &output, &output
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		c.Wait()
	}()
	t.Cleanup(func() {
		syscall.Kill(-c.Process.Pid, syscall.SIGKILL) // with its helpers
		<-exited
		if t.Failed() {
			t.Logf("%s said:\n%s", name, output.String())
		}
	})
	up := eventually(20*time.Second, func() bool {
		select {
		case <-exited:
			return true
		default:
		}
		probe, err := net.Dial("tcp", address)
		if err == nil {
			probe.Close()
		}
		return err == nil
	})
	select {
	case <-exited:
		t.Fatalf("%s ended by itself", name)
	default:
	}
	if !up {
		t.Fatalf("%s does not listen at %s", name, address)
	}
}

// folder is a temporary directory that a server's unprivileged user can enter.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sidegate-outbound")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

func write(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// startDante listens on both proxy addresses. It refuses port 9 of every destination by a rule.
func startDante(t *testing.T, port uint16, method string) {
	t.Helper()
	needNamespaces(t, "danted")
	dir := folder(t)
	config := write(t, filepath.Join(dir, "danted.conf"), fmt.Sprintf(`
logoutput: stderr
internal: %s port = %d
internal: %s port = %[2]d
external: lo
socksmethod: %[4]s
user.privileged: root
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks block { from: 0/0 to: 0/0 port = 9 }
socks pass { from: 0/0 to: 0/0 }
`, proxy4, port, proxy6, method))
	program(t, hostPort(proxy4, port), "danted", "-f", config, "-p", filepath.Join(dir, "pid"))
}

func startMicrosocks(t *testing.T, port uint16, args ...string) {
	t.Helper()
	needNamespaces(t, "microsocks")
	args = append([]string{"-i", proxy4, "-p", fmt.Sprint(port)}, args...)
	program(t, hostPort(proxy4, port), "microsocks", args...)
}

// startSquid runs squid with one listening directive, with basic authentication if asked for. It
// refuses port 9 by a rule.
func startSquid(t *testing.T, port uint16, listen string, authenticate bool) {
	t.Helper()
	needNamespaces(t, "squid")
	dir := folder(t)
	access := "http_access allow all"
	if authenticate {
		const helper = "/usr/lib/squid/basic_ncsa_auth"
		if _, err := os.Stat(helper); err != nil {
			t.Skipf("needs %s: %v", helper, err)
		}
		access = fmt.Sprintf("auth_param basic program %s %s\nacl known proxy_auth REQUIRED\nhttp_access allow known\nhttp_access deny all",
			helper, write(t, filepath.Join(dir, "users"), user+":"+passwordHash+"\n"))
	}
	config := write(t, filepath.Join(dir, "squid.conf"), strings.Join([]string{
		listen,
		"acl refused port 9",
		"http_access deny refused",
		access,
		"pid_filename none",
		"access_log none",
		"cache_log /dev/null",
		"pinger_enable off",
		"cache deny all",
		"cache_mem 8 MB",
		"coredump_dir " + dir,
		"hosts_file /etc/hosts",
		"max_filedescriptors 1024",
		"shutdown_lifetime 0 seconds",
	}, "\n")+"\n")
	program(t, hostPort(proxy4, port), "squid", "-N", "-n", fmt.Sprintf("sidegate%d", port), "-f", config)
}

// certificate makes a self-signed one for the proxy's name and addresses; both are PEM files.
func certificate(t *testing.T) (certificateFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "proxy.example"},
		DNSNames:              []string{"proxy.example"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := folder(t)
	certificateFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	write(t, certificateFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	write(t, keyFile, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})))
	return certificateFile, keyFile
}
