package wrenn

import (
	"context"
	"iter"
	"net/http"
	"net/url"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// Login exchanges email and password for a token, which the client uses from then on.
func (c *Client) Login(ctx context.Context, email, password string) (*api.Session, error) {
	var s api.Session
	_, err := c.do(ctx, call{method: http.MethodPost, path: "/v1/auth/login", as: asNobody,
		body: api.LoginRequest{Email: email, Password: password}, out: &s})
	return c.session(&s, err)
}

// Signup makes an account with a team of its own; the client uses its token from then on.
func (c *Client) Signup(ctx context.Context, r api.SignupRequest) (*api.Session, error) {
	var s api.Session
	_, err := c.do(ctx, call{method: http.MethodPost, path: "/v1/auth/signup", as: asNobody, body: r, out: &s})
	return c.session(&s, err)
}

func (c *Client) session(s *api.Session, err error) (*api.Session, error) {
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.token = s.Token
	return s, nil
}

// Me tells who the token belongs to.
func (c *Client) Me(ctx context.Context) (*api.Me, error) {
	var me api.Me
	_, err := c.do(ctx, call{method: http.MethodGet, path: "/v1/me", as: asUser, out: &me})
	return &me, err
}

// Ready asks whether the control plane can serve requests.
func (c *Client) Ready(ctx context.Context) (*api.Health, error) {
	var h api.Health
	_, err := c.once(ctx, call{method: http.MethodGet, path: "/readyz", as: asNobody, out: &h}, nil, "")
	return &h, err
}

// CreateKey makes an API key of the team. Its secret is in this answer only.
func (c *Client) CreateKey(ctx context.Context, name string) (*api.NewAPIKey, error) {
	var k api.NewAPIKey
	_, err := c.do(ctx, call{method: http.MethodPost, path: "/v1/api-keys", as: asUser,
		body: api.CreateAPIKeyRequest{Name: name}, out: &k})
	return &k, err
}

// Keys goes over the team's API keys, newest first.
func (c *Client) Keys(ctx context.Context) iter.Seq2[api.APIKey, error] {
	return pages(func(cursor string) ([]api.APIKey, string, error) {
		var l api.APIKeyList
		_, err := c.do(ctx, call{method: http.MethodGet, path: "/v1/api-keys", as: asUser, query: page(nil, cursor), out: &l})
		return l.APIKeys, l.NextCursor, err
	})
}

// DeleteKey revokes an API key: it is refused from this moment.
func (c *Client) DeleteKey(ctx context.Context, id string) error {
	_, err := c.do(ctx, call{method: http.MethodDelete, path: "/v1/api-keys/" + url.PathEscape(id), as: asUser})
	return err
}

// Templates lists what a sandbox can be made from.
func (c *Client) Templates(ctx context.Context) ([]api.Template, error) {
	var l api.TemplateList
	_, err := c.do(ctx, call{method: http.MethodGet, path: "/v1/templates", out: &l})
	return l.Templates, err
}

// pages makes one sequence of a list that comes in pages. An error ends it.
func pages[T any](get func(cursor string) (items []T, next string, err error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for cursor := ""; ; {
			items, next, err := get(cursor)
			if err != nil {
				var none T
				yield(none, err)
				return
			}
			for _, item := range items {
				if !yield(item, nil) {
					return
				}
			}
			if next == "" {
				return
			}
			cursor = next
		}
	}
}

// page is the query of one page of a list.
func page(q url.Values, cursor string) url.Values {
	out := url.Values{}
	for k, v := range q {
		out[k] = v
	}
	if cursor != "" {
		out.Set("cursor", cursor)
	}
	return out
}

// collect makes a slice of a sequence.
func collect[T any](seq iter.Seq2[T, error]) ([]T, error) {
	out := []T{}
	for item, err := range seq {
		if err != nil {
			return nil, err
		}
		out = append(out, item)
	}
	return out, nil
}
