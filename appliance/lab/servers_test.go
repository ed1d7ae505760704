package lab

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// skipMissing skips a test whose peer is not installed.
func skipMissing(t *testing.T, err error) {
	t.Helper()
	var missing MissingError
	if errors.As(err, &missing) {
		t.Skip("needs a program: ", missing)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestProxies asks real proxies for a page with curl: with the right password, where there is one, and with a wrong one.
func TestProxies(t *testing.T) {
	l := newLab(t, Options{})
	files, err := l.Host(Server).StartFiles(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	account := Credentials{"alice", "se:cret"[2:]}
	start := map[string]func(Credentials) (*Daemon, error){
		"socks5/dante": func(c Credentials) (*Daemon, error) {
			return l.Host(Upstream).StartDante(t.Context(), DanteOptions{Credentials: c})
		},
		"http/squid": func(c Credentials) (*Daemon, error) {
			return l.Host(Upstream).StartSquid(t.Context(), SquidOptions{Credentials: c})
		},
		"socks5/microsocks": func(c Credentials) (*Daemon, error) {
			return l.Host(Upstream).StartMicrosocks(t.Context(), 1090, c)
		},
	}
	for name, start := range start {
		for _, c := range []Credentials{{}, account} {
			t.Run(name+"/"+c.User, func(t *testing.T) {
				ctx := brief(t)
				proxy, err := start(c)
				skipMissing(t, err)
				scheme, _, _ := strings.Cut(name, "/")
				ask := func(c Credentials, to string) (string, error) {
					return l.Host(Laptop).Exec(ctx, "curl", "-sS", "-g", "-p", "--max-time", "5", "-x", proxy.URL(scheme, c), "http://"+to+"/whoami")
				}
				for _, to := range []string{files.Addr4().String(), files.Addr6().String()} {
					answer, err := ask(c, to)
					if err != nil {
						t.Fatal(err)
					}
					if !strings.HasPrefix(answer, l.Host(Upstream).Addr4().String()+":") && !strings.HasPrefix(answer, "["+l.Host(Upstream).Addr6().String()+"]:") {
						t.Errorf("the server saw %q, not the upstream", answer)
					}
				}
				if c.User != "" {
					c.Password = "wrong"
					if answer, err := ask(c, files.Addr4().String()); err == nil {
						t.Errorf("a wrong password got %q", answer)
					} else {
						fmt.Println(err)
					}
				}
				if err := proxy.Stop(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
