package wrenn_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// Each child of a fork is a sandbox to work with, or says why it did not come to be.
func TestFork(t *testing.T) {
	t.Parallel()
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var o api.ForkRequest
		if err := json.NewDecoder(r.Body).Decode(&o); err != nil || o.Count != 2 || r.URL.Path != "/v1/sandboxes/"+someID+"/fork" {
			t.Errorf("%s %+v %v", r.URL.Path, o, err)
		}
		answer(w, http.StatusCreated, []map[string]any{{"sandbox": map[string]any{"id": someID}}, {"error": map[string]any{"code": "no_capacity", "message": "full", "request_id": "r"}}})
	}))
	got, err := c.Sandbox(someID).Fork(context.Background(), api.ForkRequest{Count: 2})
	if err != nil || len(got) != 2 || got[0].Sandbox == nil || got[0].Err != nil || got[1].Sandbox != nil || got[1].Err == nil || got[1].Err.Code != wrenn.CodeNoCapacity {
		t.Errorf("%+v, %v", got, err)
	}
}

// A stream of events that is cut off goes on where it was: nothing is missed, nothing comes twice, also when it
// was cut off before the first event.
func TestEventsGoOn(t *testing.T) {
	t.Parallel()
	var asked []string
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.RawQuery)
		w.Header().Set("Content-Type", "text/event-stream")
		send := func(ids ...int) {
			for _, id := range ids {
				fmt.Fprintf(w, "id: %d\nevent: sandbox.running\ndata: {\"id\":%d,\"type\":\"sandbox.running\"}\n\n", id, id)
			}
		}
		switch len(asked) {
		case 1:
			fmt.Fprint(w, ": events follow\nid: 4\n\n")
		case 2:
			send(5, 6)
			fmt.Fprint(w, "id: 7\nevent: sandbox.running\ndata: {\"id\":7,\"ty") // torn
		default:
			send(6, 7, 8)
		}
	}))
	var ids []string
	for e, err := range c.Events(context.Background(), wrenn.EventOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		if ids = append(ids, fmt.Sprint(e.ID)); e.ID == 8 {
			break
		}
	}
	if got := strings.Join(ids, " "); got != "5 6 7 8" {
		t.Errorf("events %s", got)
	}
	if got := strings.Join(asked, " "); got != " after=4 after=6" {
		t.Errorf("asked for %q", got)
	}
}

func TestEventsEndWithARefusal(t *testing.T) {
	t.Parallel()
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusUnauthorized, apiError("unauthorized", "no"))
	}))
	for _, err := range c.Events(context.Background(), wrenn.EventOptions{}) {
		if wrenn.CodeOf(err) != wrenn.CodeUnauthorized {
			t.Errorf("got %v", err)
		}
	}
}
