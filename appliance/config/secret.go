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
	"syscall"
)

// Secret is a password. It never prints itself: only Reveal says what it is. The zero value is no
// password. Compare two by Equal.
type Secret struct {
	// A pointer, because fmt shows a pointer inside a structure as an address, even where it cannot
	// call the methods below (a field of another package's unexported field).
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

// Format prints String, whatever the verb.
func (s Secret) Format(f fmt.State, _ rune) { io.WriteString(f, s.String()) }

// MarshalText encodes String; JSON uses it.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue logs String.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// maxSecret bounds a password file, in bytes.
const maxSecret = 4 << 10

// readSecret reads a password file: one line, with or without its line break. A relative path is
// looked up in $CREDENTIALS_DIRECTORY (systemd's LoadCredential=) and then in directory. Open says
// which file it was and whether strangers may read it.
func readSecret(path, directory string) (secret Secret, found string, open bool, err error) {
	file, err := openSecret(path, directory)
	if err != nil {
		return Secret{}, "", false, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return Secret{}, "", false, reason(err)
	}
	if !info.Mode().IsRegular() {
		return Secret{}, "", false, fmt.Errorf("%s is not a regular file", file.Name())
	}
	data, err := io.ReadAll(io.LimitReader(file, maxSecret+1))
	if err != nil {
		return Secret{}, "", false, fmt.Errorf("reading %s: %w", file.Name(), reason(err))
	}
	line := strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r")
	switch {
	case line == "":
		return Secret{}, "", false, fmt.Errorf("%s is empty; write the password into it", file.Name())
	case len(data) > maxSecret:
		return Secret{}, "", false, fmt.Errorf("%s is larger than %d bytes; a password file holds one line", file.Name(), maxSecret)
	case strings.ContainsAny(line, "\n\r\x00"):
		return Secret{}, "", false, fmt.Errorf("%s has more than one line; leave only the password", file.Name())
	}
	return NewSecret(line), file.Name(), info.Mode().Perm()&0o004 != 0, nil
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
		// Not blocking, or a named pipe would hang the start.
		file, err := os.OpenFile(place, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err == nil {
			return file, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("opening %s: %w", place, reason(err))
		}
	}
	return nil, fmt.Errorf("there is no %s; write the password into it", strings.Join(places, " and no "))
}
