package wrenn

import (
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
)

// DefaultURL is where `wrenn up` runs the control plane.
const DefaultURL = "http://127.0.0.1:8000"

// Client speaks to one control plane. It is safe for use by many goroutines.
type Client struct {
	base      *url.URL
	http      *http.Client
	userAgent string

	mu     sync.RWMutex
	apiKey string
	token  string
}

// Option changes what New makes.
type Option func(*options)

type options struct {
	url, apiKey, token, userAgent string
	http                          *http.Client
}

// WithURL sets the control plane's address; default: WRENN_API_URL, else DefaultURL.
func WithURL(u string) Option { return func(o *options) { o.url = u } }

// WithAPIKey sets a team's API key; default: WRENN_API_KEY.
func WithAPIKey(key string) Option { return func(o *options) { o.apiKey = key } }

// WithToken sets a user's token, as Login gives it. Hosts and API keys are managed with a token.
func WithToken(token string) Option { return func(o *options) { o.token = token } }

// WithHTTPClient sets the HTTP client. It must have no overall timeout, since commands and transfers
// may take any time; use contexts.
func WithHTTPClient(c *http.Client) Option { return func(o *options) { o.http = c } }

// WithUserAgent names the program in the server's logs.
func WithUserAgent(name string) Option { return func(o *options) { o.userAgent = name } }

// New makes a client. It speaks to nobody yet.
func New(opts ...Option) (*Client, error) {
	o := options{url: os.Getenv("WRENN_API_URL"), apiKey: os.Getenv("WRENN_API_KEY"), userAgent: "wrenn-go"}
	for _, opt := range opts {
		opt(&o)
	}
	if o.url == "" {
		o.url = DefaultURL
	}
	base, err := url.Parse(strings.TrimRight(o.url, "/"))
	if err != nil || base.Host == "" || (base.Scheme != "http" && base.Scheme != "https") {
		return nil, fmt.Errorf("wrenn: %q is not an address like https://wrenn.example.com", o.url)
	}
	if o.http == nil {
		o.http = &http.Client{}
	}
	return &Client{base: base, http: o.http, userAgent: o.userAgent, apiKey: o.apiKey, token: o.token}, nil
}

// URL is the control plane's address.
func (c *Client) URL() string { return c.base.String() }

// authorize adds credentials: the token where there is one and the route wants a user, else the key.
func (c *Client) authorize(h http.Header, as credential) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	h.Set("User-Agent", c.userAgent)
	switch {
	case as == asNobody:
	case c.token != "" && (as == asUser || c.apiKey == ""):
		h.Set("Authorization", "Bearer "+c.token)
	case c.apiKey != "":
		h.Set("X-API-Key", c.apiKey)
	}
}

// credential is what a route accepts.
type credential int

const (
	asTeam   credential = iota // an API key or a token
	asUser                     // a token only
	asNobody                   // none
)
