package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

func (a *app) pauseCommand() *cobra.Command {
	var o wrenn.PauseOptions
	cmd := &cobra.Command{
		Use: "pause SANDBOX…", Short: "Pause sandboxes: they keep disk and memory and use nothing else",
		Example: `  wrenn sandbox pause my-box
  wrenn sandbox pause my-box --disk-only`,
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.change(cmd.Context(), "pausing the sandbox", args, func(ctx context.Context, sb *wrenn.Sandbox) error { return sb.PauseWith(ctx, o) })
		},
	}
	cmd.Flags().BoolVar(&o.Durable, "durable", false, "wait until the state survives a power cut")
	cmd.Flags().BoolVar(&o.DiskOnly, "disk-only", false, "give the memory up; a resume then boots")
	return cmd
}

func (a *app) resumeCommand() *cobra.Command {
	var o wrenn.ResumeOptions
	cmd := &cobra.Command{
		Use: "resume SANDBOX…", Short: "Let paused sandboxes run again, where they were",
		Example: `  wrenn sandbox resume my-box
  wrenn sandbox resume my-box --disk-only`,
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.change(cmd.Context(), "resuming the sandbox", args, func(ctx context.Context, sb *wrenn.Sandbox) error { return sb.ResumeWith(ctx, o) })
		},
	}
	cmd.Flags().BoolVar(&o.DiskOnly, "disk-only", false, "give saved memory up and boot from the disk, as after a power cut")
	return cmd
}

// change does one thing to every sandbox that is named, and shows what became of them.
func (a *app) change(ctx context.Context, what string, refs []string, do func(context.Context, *wrenn.Sandbox) error) error {
	for _, ref := range refs {
		sb, err := a.find(ctx, ref)
		if err != nil {
			return err
		}
		showing, done := a.showing(ctx, what)
		err = do(showing, sb)
		done()
		if err != nil {
			return err
		}
		if err := a.print(sb.Sandbox, func(w io.Writer) { fmt.Fprintln(w, sb.ID) }); err != nil {
			return err
		}
	}
	return nil
}
