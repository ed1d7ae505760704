package sniff

import (
	"strings"
	"testing"
)

func foundHTTP1(name string) Result {
	return Result{Status: Found, Protocol: ProtocolHTTP1, Name: name}
}

func TestHTTP1(t *testing.T) {
	nothing := Result{Status: Nothing, Protocol: ProtocolHTTP1}
	for _, c := range []struct {
		what, request string // the answer comes with the byte before |, or with the last one
		want          Result
	}{
		{"plain", "GET / HTTP/1.1\r\nHost: www.example.com\r\n|Accept: */*\r\n\r\n", foundHTTP1("www.example.com")},
		{"later", "GET /a?b HTTP/1.1\r\nAccept: */*\r\nX:\r\nHost: www.example.com\r\n|\r\n", foundHTTP1("www.example.com")},
		{"1.0", "HEAD / HTTP/1.0\r\nHost: www.example.com\r\n", foundHTTP1("www.example.com")},
		{"any case and space", "GET / HTTP/1.1\r\nhOsT:\t WWW.Example.COM. \t\r\n", foundHTTP1("www.example.com")},
		{"no space", "GET / HTTP/1.1\r\nHost:www.example.com\r\n", foundHTTP1("www.example.com")},
		{"space before the colon", "GET / HTTP/1.1\r\nHost : www.example.com\r\n", foundHTTP1("www.example.com")},
		{"bare line feeds", "GET / HTTP/1.1\nHost: www.example.com\n", foundHTTP1("www.example.com")},
		{"empty line before", "\r\nGET / HTTP/1.1\r\nHost: www.example.com\r\n", foundHTTP1("www.example.com")},
		{"bare empty line before", "\nGET / HTTP/1.1\r\nHost: www.example.com\r\n", foundHTTP1("www.example.com")},
		{"port", "GET / HTTP/1.1\r\nHost: www.example.com:8080\r\n", foundHTTP1("www.example.com")},
		{"empty port", "GET / HTTP/1.1\r\nHost: www.example.com:\r\n", foundHTTP1("www.example.com")},
		{"unknown method", "BREW-COFFEE /pot HTTP/1.1\r\nHost: a.example\r\n", foundHTTP1("a.example")},
		{"asterisk form", "OPTIONS * HTTP/1.1\r\nHost: a.example\r\n", foundHTTP1("a.example")},
		{"UTF-8 in the target", "GET /ü HTTP/1.1\r\nHost: a.example\r\n", foundHTTP1("a.example")},
		{"two hosts", "GET / HTTP/1.1\r\nHost: a.example\r\n|Host: b.example\r\n", foundHTTP1("a.example")},
		{"a folded line", "GET / HTTP/1.1\r\nX: y\r\n Host: b.example\r\nHost: a.example\r\n", foundHTTP1("a.example")},
		{"a folded host", "GET / HTTP/1.1\r\nHost:\r\n \r\n\ta.example \r\n", foundHTTP1("a.example")},
		{"PRI of HTTP/1", "PRI /x HTTP/1.1\r\nHost: a.example\r\n", foundHTTP1("a.example")},
		{"upgrade", "GET /chat HTTP/1.1\r\nUpgrade: websocket\r\nHost: a.example\r\n", foundHTTP1("a.example")},

		{"absolute form", "GET http://a.example/x HTTP/1.1\r\n|Host: b.example\r\n", foundHTTP1("a.example")},
		{"absolute form with all", "GET HTTPS://user:pw@A.example:444?q=/@b.example HTTP/1.1\r\n", foundHTTP1("a.example")},
		{"absolute form alone", "GET ws://a.example HTTP/1.1\r\n", foundHTTP1("a.example")},
		{"authority form", "CONNECT a.example:443 HTTP/1.1\r\n|Host: b.example\r\n", foundHTTP1("a.example")},
		{"authority form without a port", "CONNECT a.example HTTP/1.1\r\n", foundHTTP1("a.example")},
		{"CONNECT to an address", "CONNECT [2001:db8::1]:443 HTTP/1.1\r\n", nothing},
		{"absolute form of an address", "GET http://192.0.2.1/ HTTP/1.1\r\n|Host: b.example\r\n", nothing},

		{"IPv4", "GET / HTTP/1.1\r\nHost: 192.0.2.1:80\r\n", nothing},
		{"IPv6", "GET / HTTP/1.1\r\nHost: [2001:db8::1]\r\n", nothing},
		{"IPv6 and port", "GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n", nothing},
		{"a port that is none", "GET / HTTP/1.1\r\nHost: a.example:8x\r\n", nothing},
		{"no host", "GET / HTTP/1.1\r\nAccept: */*\r\n\r\n|more", nothing},
		{"no fields", "GET / HTTP/1.0\r\n\r\n", nothing},
		{"empty host", "GET / HTTP/1.1\r\nHost:\r\nX: y\r\n", nothing},
		{"empty host, and another", "GET / HTTP/1.1\r\nHost:\r\nHost: a.example\r\n", nothing},
		{"two names in one", "GET / HTTP/1.1\r\nHost: a.example, b.example\r\n", nothing},
		{"a NUL in a field", "GET / HTTP/1.1\r\nX: \x00|\r\nHost: a.example\r\n", nothing},
		{"no colon", "GET / HTTP/1.1\r\nnonsense\r\n|Host: a.example\r\n", nothing},

		{"a target that is none", "GET b.example HTTP/1.1\r\nHost: a.example\r\n", foundHTTP1("a.example")},
		{"a scheme that is none", "GET a,b://b.example HTTP/1.1\r\nHost: a.example\r\n", foundHTTP1("a.example")},
		{"absolute form without a host", "GET http:///x HTTP/1.1\r\nHost: a.example\r\n", foundHTTP1("a.example")},
		{"absolute form with no more than a user", "GET http://b@/ HTTP/1.1\r\nHost: a.example\r\n", foundHTTP1("a.example")},
		{"a path whose end looks like an authority", "GET a:/x://b.example HTTP/1.1\r\nHost: a.example\r\n", foundHTTP1("a.example")},
		{"authority form with a path", "CONNECT a.example/x HTTP/1.1\r\n|Host: b.example\r\n", foundHTTP1("a.example")},
		{"CONNECT to a path", "CONNECT /@ HTTP/1.1\r\nHost: a.example\r\n", foundHTTP1("a.example")},
		{"version 2", "GET / HTTP/2|.0\r\n", Result{Status: Nothing}},
		{"version without a digit", "GET / HTTP/1.x|\r\n", Result{Status: Nothing}},
		{"version with two digits", "GET / HTTP/1.10|\r\n", Result{Status: Nothing}},
		{"no target", "GET  |/ HTTP/1.1\r\n", Result{Status: Nothing}},
		{"strange target", "GET <|a> HTTP/1.1\r\n", Result{Status: Nothing}},
		{"lower case", "g|et / HTTP/1.1\r\n", Result{Status: Nothing}},
		{"a long method", strings.Repeat("A", maxMethod) + "A|AAA", Result{Status: Nothing}},
		{"only a method", "QUIT\r\n", Result{Status: Nothing}},
		{"two empty lines", "\r\n\r\n", Result{Status: Nothing}},
		{"a space first", " |GET", Result{Status: Nothing}},
	} {
		t.Run(c.what, func(t *testing.T) {
			head, tail, _ := strings.Cut(c.request, "|")
			for n := range len(head) {
				if got := Stream([]byte(head[:n])); got.Status != More {
					t.Fatalf("after %q: %+v, want more", head[:n], got)
				}
			}
			for n := range len(tail) + 1 {
				if got := Stream([]byte(head + tail[:n])); got != c.want {
					t.Fatalf("after %q: %+v, want %+v", head+tail[:n], got, c.want)
				}
			}
		})
	}
}
