package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"time"
)

// Authority signs the certificates of the lab's servers.
type Authority struct {
	File        string         // its own certificate, in PEM, for programs
	Pool        *x509.CertPool // the same, for Go
	Fingerprint string         // SHA-256 of its public key in base64, as browsers take it

	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// Certificate is one with its key, followed by that of the authority.
type Certificate struct {
	File, Key string // PEM
	Pair      tls.Certificate
}

// Authority returns the lab's only one, which exists from the first call on.
func (l *Lab) Authority() (*Authority, error) { return l.authority() }

func (l *Lab) newAuthority() (_ *Authority, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("making the lab's certification authority: %w", err)
		}
	}()
	a := &Authority{File: l.file("authority", ".crt"), Pool: x509.NewCertPool()}
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	template := certificateTemplate("the lab's authority")
	template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	if a.certificate, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	digest := sha256.Sum256(a.certificate.RawSubjectPublicKeyInfo)
	a.Fingerprint = base64.StdEncoding.EncodeToString(digest[:])
	a.Pool.AddCert(a.certificate)
	return a, os.WriteFile(a.File, a.pem(), 0o644)
}

func (a *Authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw})
}

// Certificate makes one for the host's addresses and for names.
func (h *Host) Certificate(names ...string) (_ *Certificate, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("making a certificate for %s: %w", h.name, err)
		}
	}()
	a, err := h.lab.Authority()
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := certificateTemplate(h.name)
	template.DNSNames = names
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, address := range []netip.Addr{h.Addr4(), h.Addr6()} {
		template.IPAddresses = append(template.IPAddresses, net.IP(address.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	chain := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), a.pem()...)
	secret = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
	c := &Certificate{File: h.lab.file(h.name, ".crt"), Key: h.lab.file(h.name, ".key")}
	if err := os.WriteFile(c.File, chain, 0o644); err != nil {
		return nil, err
	}
	if err := os.WriteFile(c.Key, secret, 0o600); err != nil {
		return nil, err
	}
	c.Pair, err = tls.X509KeyPair(chain, secret)
	return c, err
}

// certificateTemplate has what all have in common. Serial numbers are random: browsers refuse two certificates of one
// authority and number.
func certificateTemplate(name string) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err) // crypto/rand never fails
	}
	return &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
	}
}
