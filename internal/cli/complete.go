package cli

import (
	"strings"
	"time"

	"context"

	"github.com/spf13/cobra"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

// completeLimit is how long the shell waits for suggestions.
const completeLimit = 2 * time.Second

func (a *app) completeSandbox(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 && cmd.Name() != "rm" {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return a.sandboxNames(cmd.Context(), prefix, ""), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) sandboxNames(ctx context.Context, prefix, suffix string) []string {
	c, err := a.connect()
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, completeLimit)
	defer cancel()
	var out []string
	for sb, err := range c.Sandboxes(ctx, wrenn.SandboxFilter{}) {
		if err != nil {
			break
		}
		for _, name := range []string{sb.ID, sb.Name} {
			if name != "" && strings.HasPrefix(name, prefix) {
				out = append(out, name+suffix)
			}
		}
	}
	return out
}

func (a *app) completeTemplates(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	c, err := a.connect()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completeLimit)
	defer cancel()
	var out []string
	for t, err := range c.Snapshots(ctx, "") {
		if err != nil {
			break
		}
		if strings.HasPrefix(t.Name, prefix) {
			out = append(out, t.Name)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}
