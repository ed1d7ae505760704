package gateway_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// TestMetrics drives traffic and reads in the figures what was done, as Prometheus does.
func TestMetrics(t *testing.T) {
	w := newWorld(t)
	hk := w.dante(t)
	files, err := w.server().StartFiles(t.Context(), 80)
	need(t, err)
	const listen = "metrics: { listen: \"127.0.0.1:9653\" }\n"
	rules := `interfaces: { lan: auto }
rules:
  - { port: 81, outbound: block, reject: true }
  - { name: web, port: 80, outbound: hk }
default: direct
`
	w.start(t, hk+listen+rules)
	before := w.scrape(t)
	const asks = 5
	for range asks {
		if _, err := w.ask(t.Context(), files); err != nil {
			t.Fatal(err)
		}
	}
	if c, err := w.laptop().Dial(t.Context(), "tcp", w.server().Addr4().String()+":81"); err == nil {
		c.Close()
		t.Error("port 81 is not blocked")
	}
	if _, err := w.laptop().Ping(t.Context(), w.server().Addr4()); err != nil {
		t.Fatal(err)
	}
	after := w.scrape(t)
	for series, want := range map[string]float64{
		`sidegate_flows_decided_total{outbound="hk",rule="web",verdict="proxy"}`:          asks,
		`sidegate_flows_decided_total{outbound="block",rule="#1",verdict="block"}`:        1,
		`sidegate_flows_decided_total{outbound="direct",rule="default",verdict="direct"}`: 1,
		`sidegate_dropped_packets_total{reason="rule_reject"}`:                            1,
		`sidegate_proxy_opened_total{network="tcp",outbound="hk"}`:                        asks,
		`sidegate_proxy_refused_total{reason="not_proxied"}`:                              0,
		`sidegate_clients`:                              1,
		`sidegate_table_entries{table="flows"}`:         asks + 2,
		`sidegate_policy_generation`:                    0,
		`sidegate_interface_attached{interface="eth0"}`: 0,
	} {
		if _, ok := after[series]; !ok {
			t.Errorf("there is no %s", series)
		} else if got := after[series] - before[series]; got != want {
			t.Errorf("%s grew by %v, want %v", series, got, want)
		}
	}
	for series, least := range map[string]float64{
		`sidegate_proxy_bytes_total{direction="up",outbound="hk"}`:   asks * 50,
		`sidegate_proxy_bytes_total{direction="down",outbound="hk"}`: asks * 50,
		`sidegate_table_capacity{table="flows"}`:                     1000,
		`sidegate_last_reload_timestamp_seconds`:                     1e9,
		`sidegate_last_reload_success`:                               1,
		`sidegate_policy_rules`:                                      2,
		`sidegate_process_open_fds`:                                  10,
		`sidegate_process_resident_memory_bytes`:                     1e6,
		`sidegate_go_goroutines`:                                     5,
	} {
		if after[series] < least {
			t.Errorf("%s is %v, want %v at least", series, after[series], least)
		}
	}

	// A reload moves the endpoint, and a counter never falls.
	w.rewrite(t, hk+strings.Replace(listen, "9653", "9654", 1)+rules)
	if r := w.hangUp(t); !r.OK {
		t.Fatal(r.Error)
	}
	if status, _ := w.get(t, http.MethodGet, "http://127.0.0.1:9653/metrics", ""); status != 0 {
		t.Errorf("the endpoint still answers on its old address, with %d", status)
	}
	const decided = `sidegate_flows_decided_total{outbound="hk",rule="web",verdict="proxy"}`
	if moved := w.scrapeAt(t, "127.0.0.1:9654"); moved[decided] != after[decided] || moved["sidegate_policy_generation"] != after["sidegate_policy_generation"]+1 {
		t.Errorf("%s was %v, is %v after a reload", decided, after[decided], moved[decided])
	}
}

// TestMetricsAreForTheBoxOnly: what a web page could make a browser on the box ask is refused.
func TestMetricsAreForTheBoxOnly(t *testing.T) {
	w := newWorld(t)
	w.start(t, "interfaces: { lan: auto }\nmetrics: { listen: \"127.0.0.1:9653\" }\ndefault: direct\n")
	for _, c := range []struct {
		method, path, header string
		want                 int
	}{
		{http.MethodGet, "/metrics", "", http.StatusOK},
		{http.MethodGet, "/metrics", "Host: localhost:9653", http.StatusOK},
		{http.MethodGet, "/metrics", "Host: evil.example", http.StatusMisdirectedRequest},
		{http.MethodGet, "/metrics", "Host: 192.168.0.2:9653", http.StatusMisdirectedRequest},
		{http.MethodGet, "/metrics", "Origin: https://evil.example", http.StatusForbidden},
		{http.MethodGet, "/metrics", "Sec-Fetch-Site: cross-site", http.StatusForbidden},
		{http.MethodPost, "/metrics", "", http.StatusMethodNotAllowed},
		{http.MethodGet, "/", "", http.StatusNotFound},
		{http.MethodGet, "/v1/status", "", http.StatusNotFound},
		{http.MethodGet, "/metrics", "X: " + strings.Repeat("x", 64<<10), http.StatusRequestHeaderFieldsTooLarge},
	} {
		if got, body := w.get(t, c.method, "http://127.0.0.1:9653"+c.path, c.header); got != c.want {
			t.Errorf("%s %s with %.40q: %d, want %d: %.80s", c.method, c.path, c.header, got, c.want, body)
		}
	}
	if c, err := w.laptop().Dial(t.Context(), "tcp", w.box().Addr4().String()+":9653"); err == nil {
		c.Close()
		t.Error("the endpoint is reachable from the LAN")
	}
}

// get asks from the box. The status is 0 if nobody answers.
func (w *world) get(t *testing.T, method, url, header string) (status int, body string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	need(t, err)
	if key, value, ok := strings.Cut(header, ": "); ok {
		request.Header.Set(key, value)
		if key == "Host" {
			request.Host = value
		}
	}
	response, err := w.box().HTTP().Do(request)
	if err != nil {
		return 0, err.Error()
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	need(t, err)
	return response.StatusCode, string(text)
}

func (w *world) scrape(t *testing.T) map[string]float64 { return w.scrapeAt(t, "127.0.0.1:9653") }

// scrapeAt reads and parses the figures: series in the usual notation, and their values.
func (w *world) scrapeAt(t *testing.T, address string) map[string]float64 {
	t.Helper()
	status, body := w.get(t, http.MethodGet, "http://"+address+"/metrics", "")
	if status != http.StatusOK {
		t.Fatalf("the scrape ended with %d: %s", status, body)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(body))
	if err != nil {
		t.Fatalf("the figures cannot be parsed: %v", err)
	}
	figures := map[string]float64{}
	for name, f := range families {
		if !strings.HasPrefix(name, "sidegate_") || len(f.GetHelp()) < 10 {
			t.Errorf("%s has not our prefix, or no help", name)
		}
		for _, m := range f.Metric {
			labels := model.LabelSet{}
			for _, l := range m.Label {
				labels[model.LabelName(l.GetName())] = model.LabelValue(l.GetValue())
			}
			series := name
			if len(labels) > 0 {
				series += strings.ReplaceAll(labels.String(), ", ", ",")
			}
			switch {
			case m.Counter != nil:
				figures[series] = m.Counter.GetValue()
			case m.Gauge != nil:
				figures[series] = m.Gauge.GetValue()
			}
		}
	}
	return figures
}
