package wrenn

import (
	"context"
	"iter"
	"net/http"
	"net/url"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// CreateHost makes a host record and the one-time token with which its agent registers.
func (c *Client) CreateHost(ctx context.Context, r api.CreateHostRequest) (*api.HostWithToken, error) {
	var h api.HostWithToken
	_, err := c.do(ctx, call{method: http.MethodPost, path: "/v1/hosts", as: asUser, body: r, out: &h})
	return &h, err
}

// HostFilter selects hosts; what is empty does not count.
type HostFilter struct {
	Status api.HostStatus
	Type   api.HostType
	Tag    string
}

// Hosts goes over the hosts that the user may see, newest first.
func (c *Client) Hosts(ctx context.Context, f HostFilter) iter.Seq2[api.Host, error] {
	q := url.Values{}
	set(q, "status", string(f.Status))
	set(q, "type", string(f.Type))
	set(q, "tag", f.Tag)
	return pages(func(cursor string) ([]api.Host, string, error) {
		var l api.HostList
		_, err := c.do(ctx, call{method: http.MethodGet, path: "/v1/hosts", as: asUser, query: page(q, cursor), out: &l})
		return l.Hosts, l.NextCursor, err
	})
}

// Host gets one host.
func (c *Client) Host(ctx context.Context, id string) (*api.Host, error) {
	var h api.Host
	_, err := c.do(ctx, call{method: http.MethodGet, path: hostPath(id), as: asUser, out: &h})
	return &h, err
}

// DeleteHost deletes a host that has no sandboxes.
func (c *Client) DeleteHost(ctx context.Context, id string) error {
	_, err := c.do(ctx, call{method: http.MethodDelete, path: hostPath(id), as: asUser})
	return err
}

// NewHostToken makes a new registration token for a host that is still pending.
func (c *Client) NewHostToken(ctx context.Context, id string) (*api.HostWithToken, error) {
	var h api.HostWithToken
	_, err := c.do(ctx, call{method: http.MethodPost, path: hostPath(id) + "/token", as: asUser, out: &h})
	return &h, err
}

// HostTags lists a host's tags.
func (c *Client) HostTags(ctx context.Context, id string) ([]string, error) {
	var l api.TagList
	_, err := c.do(ctx, call{method: http.MethodGet, path: hostPath(id) + "/tags", as: asUser, out: &l})
	return l.Tags, err
}

// AddHostTag adds a tag; one that is there already stays.
func (c *Client) AddHostTag(ctx context.Context, id, tag string) error {
	_, err := c.do(ctx, call{method: http.MethodPost, path: hostPath(id) + "/tags", as: asUser, body: api.AddTagRequest{Tag: tag}})
	return err
}

// RemoveHostTag removes a tag.
func (c *Client) RemoveHostTag(ctx context.Context, id, tag string) error {
	_, err := c.do(ctx, call{method: http.MethodDelete, path: hostPath(id) + "/tags/" + url.PathEscape(tag), as: asUser})
	return err
}

func hostPath(id string) string { return "/v1/hosts/" + url.PathEscape(id) }

func set(q url.Values, key, value string) {
	if value != "" {
		q.Set(key, value)
	}
}
