// Command wrenn-agent is the host agent; see package agent.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/wrenn-sandbox/wrenn/internal/agent"
)

func main() {
	err := agent.Run(context.Background(), os.Args[1:], os.Getenv, agent.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr})
	if err != nil {
		fmt.Fprintln(os.Stderr, "wrenn-agent:", err)
		os.Exit(1)
	}
}
