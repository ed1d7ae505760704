package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
)

// Secret is a password. It never prints itself: only Reveal says what it is. The zero value is no
// password. Compare two by Equal.
type Secret struct {
	// A pointer: where fmt does not call String, for %#v or in an unexported field, it prints an address.
	text *string
}

const redacted = "[redacted]"

// NewSecret makes a secret of a text.
func NewSecret(text string) Secret { return Secret{&text} }

// Reveal is the password, for whoever sends it.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return *s.text
}

// IsZero says that there is no password.
func (s Secret) IsZero() bool { return s.text == nil }

// Equal says whether two secrets are the same password.
func (s Secret) Equal(other Secret) bool {
	return s.IsZero() == other.IsZero() && s.Reveal() == other.Reveal()
}

func (s Secret) String() string {
	if s.text == nil {
		return ""
	}
	return redacted
}

// MarshalText encodes String; JSON uses it.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue logs String.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// maxSecret bounds a password file, in bytes.
const maxSecret = 4 << 10

// readSecret reads a password file: one line, with or without its line break. A relative path is
// looked up in $CREDENTIALS_DIRECTORY (systemd's LoadCredential=) and then in directory. Warning is
// what a careful owner wants to know; it may be empty.
func readSecret(path, directory string) (secret Secret, warning string, err error) {
	file, err := openSecret(path, directory)
	if err != nil {
		return Secret{}, "", err
	}
	defer file.Close()
	name := file.Name()
	info, err := file.Stat()
	if err != nil {
		return Secret{}, "", fmt.Errorf("reading %s: %w", name, reason(err))
	}
	data, err := io.ReadAll(io.LimitReader(file, maxSecret+1))
	if err != nil {
		return Secret{}, "", fmt.Errorf("reading %s: %w", name, reason(err))
	}
	line := strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r")
	switch {
	case line == "":
		return Secret{}, "", fmt.Errorf("%s is empty; write the password into it", name)
	case len(data) > maxSecret:
		return Secret{}, "", fmt.Errorf("%s is larger than %d bytes; a password file holds one line", name, maxSecret)
	case strings.ContainsAny(line, "\n\r\x00"):
		return Secret{}, "", fmt.Errorf("%s has more than one line; leave only the password", name)
	case info.Mode().Perm()&0o004 != 0:
		warning = fmt.Sprintf("everybody can read %s; chmod 600 it", name)
	}
	return NewSecret(line), warning, nil
}

func openSecret(path, directory string) (*os.File, error) {
	places := []string{path}
	if !filepath.IsAbs(path) {
		places = []string{filepath.Join(directory, path)}
		if credentials := os.Getenv("CREDENTIALS_DIRECTORY"); credentials != "" && filepath.IsLocal(path) {
			places = []string{filepath.Join(credentials, path), places[0]}
		}
	}
	for _, place := range places {
		// Opening a named pipe would hang the start, and a device may do anything.
		info, err := os.Stat(place)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err == nil && !info.Mode().IsRegular():
			return nil, fmt.Errorf("%s is not a regular file", place)
		}
		file, err := os.Open(place)
		if err != nil {
			return nil, fmt.Errorf("opening %s: %w", place, reason(err))
		}
		return file, nil
	}
	return nil, fmt.Errorf("there is no %s; write the password into it", strings.Join(places, " and no "))
}
