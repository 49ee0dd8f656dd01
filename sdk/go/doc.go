// Package wrenn is the Go client of Wrenn: microVMs for people and their agents.
//
//	client, err := wrenn.New() // reads WRENN_API_URL and WRENN_API_KEY
//	sb, err := client.CreateSandbox(ctx, wrenn.SandboxOptions{Template: "base"})
//	defer sb.Delete(ctx)
//	res, err := sb.Exec(ctx, "python3", "-c", "print(6 * 7)")
//	fmt.Printf("%s", res.Stdout)
//
// Every call takes a context. Failures that the server reports are *APIError, with a stable Code and
// the request id; those on the way to it are ordinary errors. Mutations carry an Idempotency-Key, so
// a call that is repeated after a lost connection happens once.
//
// Package api, beside this one, holds the types on the wire, generated from the API's description.
package wrenn
