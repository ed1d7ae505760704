package outbound

import "errors"

// Credentials are what an upstream proxy asks for. They never appear in an error or a log.
type Credentials struct {
	Username, Password string
}

// New makes the outbound that a URL describes.
func New(name, rawURL string, credentials Credentials, o Options) (Outbound, error) {
	return nil, errors.New("not yet")
}
