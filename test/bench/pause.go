package main

import (
	"context"
	"errors"
	"net/http"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

// measurePause times pause and resume through REST, beside the same by hand.
func measurePause(ctx context.Context, b *bench) (err error) {
	if err := b.prepare(ctx, "minimal", smallMB); err != nil {
		return err
	}
	sb, err := b.create(ctx, "minimal", smallMB)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.remove(ctx, sb)) }()
	var no *statusError
	if _, err := b.ask(ctx, sb, "pause"); errors.As(err, &no) && no.status == http.StatusNotImplemented {
		b.skip("the API does not offer it yet (501)")
		return nil
	} else if err != nil {
		return err
	}
	return nil
}

func (b *bench) ask(ctx context.Context, sb *wrenn.Sandbox, operation string) ([]byte, error) {
	r := request{method: http.MethodPost, path: "/v1/sandboxes/" + sb.ID + "/" + operation, header: "X-API-Key", value: b.stack.Key, body: []byte("{}")}
	return r.do(ctx, http.DefaultClient, b.stack.URL)
}
