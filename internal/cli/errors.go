package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

// usageError is a command line that is wrong.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// noArgs, oneArg and someArgs say which arguments a command takes, in words.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("%s takes no argument, but was given %q", cmd.CommandPath(), args[0])
	}
	return nil
}

func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usagef("%s needs %s", cmd.CommandPath(), strings.Join(names[len(args):], " and "))
		case len(args) > len(names):
			return usagef("%s does not know what to do with %q", cmd.CommandPath(), args[len(names)])
		}
		return nil
	}
}

func atLeast(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usagef("%s needs %s", cmd.CommandPath(), strings.Join(names[len(args):], " and "))
		}
		return nil
	}
}

var errNotLoggedIn = errors.New("not logged in")

// hint is what to do about an error, or "".
func hint(err error) string {
	var lost *wrenn.ConnectionError
	var failed *wrenn.APIError
	var usage *usageError
	switch {
	case errors.Is(err, errNotLoggedIn):
		return "run `wrenn up` to have Wrenn on this machine, or `wrenn login URL` for one that runs elsewhere"
	case errors.As(err, &lost) && loopback(lost.URL):
		return "is it running? `wrenn status` shows, `wrenn up` starts it"
	case errors.As(err, &lost):
		return "check the address (WRENN_API_URL, or `wrenn login URL`) and the network"
	case errors.As(err, &usage):
		return ""
	case errors.As(err, &failed):
		switch failed.Code {
		case wrenn.CodeUnauthorized:
			return "`wrenn login` again, or set WRENN_API_KEY"
		case wrenn.CodeNoCapacity, wrenn.CodeHostUnavailable:
			return "`wrenn host ls` shows the hosts and whether they are online"
		case wrenn.CodeInvalidState:
			return "`wrenn sandbox get` shows its state"
		}
	}
	return ""
}

func loopback(rawURL string) bool {
	u, err := url.Parse(rawURL)
	return err == nil && (u.Hostname() == "localhost" || strings.HasPrefix(u.Hostname(), "127.") || u.Hostname() == "::1")
}

// report writes an error to standard error, in the form that -o asks for.
func (a *app) report(cmd *cobra.Command, err error) {
	if a.output == "json" {
		body := map[string]any{"code": "error", "message": err.Error()}
		var failed *wrenn.APIError
		if errors.As(err, &failed) {
			body = map[string]any{"code": failed.Code, "message": failed.Message, "request_id": failed.RequestID}
			if len(failed.Details) > 0 {
				body["details"] = failed.Details
			}
		}
		if h := hint(err); h != "" {
			body["hint"] = h
		}
		_ = json.NewEncoder(a.stdio.Err).Encode(map[string]any{"error": body})
		return
	}
	if errors.Is(err, context.Canceled) {
		fmt.Fprintln(a.stdio.Err, "wrenn: interrupted")
		return
	}
	fmt.Fprintln(a.stdio.Err, "wrenn:", err)
	if h := hint(err); h != "" {
		fmt.Fprintln(a.stdio.Err, "  →", h)
	}
	var usage *usageError
	if errors.As(err, &usage) || strings.HasPrefix(err.Error(), "unknown command") {
		fmt.Fprintf(a.stdio.Err, "  → `%s --help` shows how to use it\n", cmd.CommandPath())
	}
}

func exitCode(cmd *cobra.Command, err error) int {
	var usage *usageError
	switch {
	case cmd.Annotations["exec"] != "":
		return exitExec
	case errors.As(err, &usage), strings.HasPrefix(err.Error(), "unknown command"):
		return exitUsage
	}
	return exitFailure
}
