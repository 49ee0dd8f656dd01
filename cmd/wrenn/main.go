// Command wrenn is the user's command line; see package cli.
package main

import (
	"context"
	"os"

	"github.com/wrenn-sandbox/wrenn/internal/cli"
)

func main() {
	os.Exit(cli.Run(context.Background(), os.Args[1:], os.Getenv, cli.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
}
