package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

func (a *app) forkCommand() *cobra.Command {
	var o api.ForkRequest
	var env, metadata []string
	cmd := &cobra.Command{
		Use: "fork SANDBOX", Short: "Make children of a sandbox as it is now, and print their ids",
		Long: "Makes children of a running or paused sandbox as it is now, with all its processes. Each is a sandbox of its own; the source goes on.",
		Example: `  wrenn sandbox fork my-box
  wrenn sandbox fork my-box --count 10 --name try -e ROLE=child`,
		Args: exactArgs("a SANDBOX"), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := errors.Join(pairs("--env", env, (*map[string]string)(&o.Env)), pairs("--metadata", metadata, (*map[string]string)(&o.Metadata))); err != nil {
				return err
			}
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.fork(cmd.Context(), sb, o)
		},
	}
	f := cmd.Flags()
	f.Int32VarP(&o.Count, "count", "n", 1, "how many")
	f.StringVar(&o.Name, "name", "", "`NAME` to know it by; several get it with -1, -2, …")
	f.StringArrayVarP(&env, "env", "e", nil, "`NAME=VALUE` added to the source's; may be repeated")
	f.StringArrayVarP(&metadata, "metadata", "m", nil, "label `KEY=VALUE` added to the source's; may be repeated")
	return cmd
}

// fork shows the children that came to be; that some did not is an error.
func (a *app) fork(ctx context.Context, sb *wrenn.Sandbox, o api.ForkRequest) error {
	ctx, done := a.showing(ctx, "forking the sandbox")
	children, err := sb.Fork(ctx, o)
	done()
	if err != nil {
		return err
	}
	made, errs := []api.Sandbox{}, []error{}
	for _, c := range children {
		if c.Err != nil {
			errs = append(errs, c.Err)
		} else {
			made = append(made, c.Sandbox.Sandbox)
		}
	}
	return errors.Join(append(errs, a.print(made, func(w io.Writer) { printSandboxes(w, made, true) }))...)
}

func (a *app) checkpointCommand() *cobra.Command {
	cmd := group("checkpoint", "Save moments of a sandbox to go back to", "checkpoints")
	cmd.AddCommand(a.checkpointCreateCommand(), a.checkpointListCommand(), a.checkpointRemoveCommand())
	return cmd
}

func (a *app) checkpointCreateCommand() *cobra.Command {
	return &cobra.Command{
		Use: "create SANDBOX [NAME]", Short: "Save the moment of a sandbox, and print the checkpoint's id",
		Example: "  wrenn sandbox checkpoint create my-box before-upgrade",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 2 {
				return nil
			}
			return exactArgs("a SANDBOX")(cmd, args)
		},
		ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			ctx, done := a.showing(cmd.Context(), "saving the sandbox")
			c, err := sb.Checkpoint(ctx, strings.Join(args[1:], ""))
			done()
			if err != nil {
				return err
			}
			return a.print(c, func(w io.Writer) { fmt.Fprintln(w, c.ID) })
		},
	}
}

func (a *app) checkpointListCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ls SANDBOX", Aliases: []string{"list"}, Short: "Show a sandbox's checkpoints as a tree", Args: exactArgs("a SANDBOX"), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			list, err := sb.Checkpoints(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) {
				rows := checkpointRows(list)
				table(w, []string{"ID", "NAME", "MEMORY", "SIZE", "OWN", "AGE"}, rows)
			})
		},
	}
}

// checkpointRows puts checkpoints below their parents, two spaces deeper; where the parent is not in the
// list they stand on their own.
func checkpointRows(list []api.Checkpoint) [][]string {
	known, children := map[string]bool{}, map[string][]api.Checkpoint{}
	for _, c := range list {
		known[c.ID] = true
	}
	for _, c := range list {
		parent := c.ParentID
		if !known[parent] {
			parent = ""
		}
		children[parent] = append(children[parent], c)
	}
	var rows [][]string
	var walk func(parent, indent string)
	walk = func(parent, indent string) {
		for _, c := range children[parent] {
			memory := "no"
			if c.Memory {
				memory = "yes"
			}
			if c.Missing {
				memory += " (missing on its host)"
			}
			rows = append(rows, []string{indent + c.ID, c.Name, memory, size(c.SizeBytes), size(c.OwnBytes), age(c.CreatedAt)})
			walk(c.ID, indent+"  ")
		}
	}
	walk("", "")
	return rows
}

func (a *app) checkpointRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm SANDBOX CHECKPOINT…", Aliases: []string{"delete"}, Short: "Delete checkpoints; what descends from them stays", Args: atLeast("a SANDBOX", "a CHECKPOINT"),
		ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.removeEach(args[1:], func(ref string) (string, error) {
				c, err := sb.FindCheckpoint(cmd.Context(), ref)
				if err != nil {
					return "", err
				}
				return c.ID, sb.DeleteCheckpoint(cmd.Context(), c.ID)
			})
		},
	}
}

// removeEach removes what is named, goes on after failures, and shows what is gone.
func (a *app) removeEach(refs []string, remove func(ref string) (id string, err error)) error {
	deleted, errs := []string{}, []error{}
	for _, ref := range refs {
		id, err := remove(ref)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		deleted = append(deleted, id)
	}
	return errors.Join(append(errs, a.print(map[string]any{"deleted": deleted}, func(w io.Writer) {
		for _, id := range deleted {
			fmt.Fprintln(w, id)
		}
	}))...)
}

func (a *app) rollbackCommand() *cobra.Command {
	var discard bool
	cmd := &cobra.Command{
		Use: "rollback SANDBOX CHECKPOINT", Short: "Take a sandbox back to a checkpoint, in place",
		Long: "Takes a sandbox back to one of its checkpoints, by id or name; it then runs. The state left behind becomes a checkpoint itself, whose id is printed.",
		Example: `  wrenn sandbox rollback my-box before-upgrade
  wrenn sandbox rollback my-box before-upgrade --discard`,
		Args: exactArgs("a SANDBOX", "a CHECKPOINT"), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			c, err := sb.FindCheckpoint(cmd.Context(), args[1])
			if err != nil {
				return err
			}
			ctx, done := a.showing(cmd.Context(), "taking the sandbox back")
			leftAs, err := sb.Rollback(ctx, c.ID, discard)
			done()
			if err != nil {
				return err
			}
			return a.print(api.RollbackResult{Sandbox: sb.Sandbox, LeftAs: leftAs}, func(w io.Writer) {
				if leftAs != "" {
					fmt.Fprintln(w, leftAs)
				}
			})
		},
	}
	cmd.Flags().BoolVar(&discard, "discard", false, "do not keep the state left behind")
	return cmd
}

func (a *app) storageCommand() *cobra.Command {
	return &cobra.Command{
		Use: "storage SANDBOX", Short: "Show what a sandbox costs on disk", Args: exactArgs("a SANDBOX"), ValidArgsFunction: a.completeSandbox,
		Long: "Shows what a sandbox and its checkpoints cost on their host's disk: SIZE is what it would take to store each alone, OWN what nothing else there shares with it.",
		RunE: func(cmd *cobra.Command, args []string) error {
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			use, err := sb.Storage(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(use, func(w io.Writer) {
				row := func(what string, s, own int64) []string { return []string{what, size(s), size(own)} }
				rows := [][]string{row("disk", use.Disk.SizeBytes, use.Disk.OwnBytes), row("memory", use.Memory.SizeBytes, use.Memory.OwnBytes)}
				for _, c := range use.Checkpoints {
					rows = append(rows, row("checkpoint "+strings.TrimSpace(c.ID+" "+c.Name), c.SizeBytes, c.OwnBytes))
				}
				table(w, []string{"WHAT", "SIZE", "OWN"}, append(rows, row("total", use.Total.SizeBytes, use.Total.OwnBytes)))
			})
		},
	}
}

func (a *app) snapshotCommand() *cobra.Command {
	cmd := group("snapshot", "Make templates of sandboxes as they are now", "snapshots")
	cmd.AddCommand(a.snapshotCreateCommand(), a.snapshotListCommand(), a.snapshotRemoveCommand())
	return cmd
}

func (a *app) snapshotCreateCommand() *cobra.Command {
	var overwrite bool
	cmd := &cobra.Command{
		Use: "create SANDBOX [NAME]", Short: "Make a template of a sandbox as it is now, and print its name",
		Long: "Makes a template of a running or paused sandbox, which goes on as it was. Others are created from it by name, on the host that has it, and go on where it was saved.",
		Example: `  wrenn snapshot create my-box ready
  wrenn sandbox create ready`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 2 {
				return nil
			}
			return exactArgs("a SANDBOX")(cmd, args)
		},
		ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			sb, err := c.FindSandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			ctx, done := a.showing(cmd.Context(), "saving the sandbox")
			s, err := c.CreateSnapshot(ctx, api.CreateSnapshotRequest{SandboxID: sb.ID, Name: strings.Join(args[1:], ""), Overwrite: overwrite})
			done()
			if err != nil {
				return err
			}
			return a.print(s, func(w io.Writer) { fmt.Fprintln(w, s.Name) })
		},
	}
	cmd.Flags().BoolVar(&overwrite, "overwrite", false, "in place of a snapshot of that name")
	return cmd
}

func (a *app) snapshotListCommand() *cobra.Command {
	var kind string
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List images and snapshots", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			list := []api.Snapshot{}
			for s, err := range c.Snapshots(cmd.Context(), api.SnapshotType(kind)) {
				if err != nil {
					return err
				}
				list = append(list, s)
			}
			return a.print(list, func(w io.Writer) {
				rows := make([][]string, len(list))
				for i, s := range list {
					own := ""
					if s.Type == api.SnapshotTypeSnapshot {
						own = size(s.OwnBytes)
					}
					rows[i] = []string{s.Name, string(s.Type), s.Template, megabytes(s.DiskMB), own, s.HostID, age(s.CreatedAt)}
				}
				table(w, []string{"NAME", "TYPE", "FROM", "DISK", "OWN", "HOST", "AGE"}, rows)
			})
		},
	}
	cmd.Flags().StringVar(&kind, "type", "", "only base or snapshot")
	return cmd
}

func (a *app) snapshotRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME…", Aliases: []string{"delete"}, Short: "Delete snapshots that no sandbox was made from", Args: atLeast("a NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			return a.removeEach(args, func(name string) (string, error) { return name, c.DeleteSnapshot(cmd.Context(), name) })
		},
	}
}

func (a *app) eventsCommand() *cobra.Command {
	var o wrenn.EventOptions
	cmd := &cobra.Command{
		Use: "events [SANDBOX]", Short: "Follow what happens to the team's sandboxes and snapshots",
		Long: "Shows events as they come, until it is interrupted; with -o json one JSON text for each line.",
		Example: `  wrenn events
  wrenn events my-box --all`,
		Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				sb, err := c.FindSandbox(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				o.Subject = sb.ID
			}
			for e, err := range c.Events(cmd.Context(), o) {
				if cmd.Context().Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				if err := a.printEvent(e); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().Int64Var(&o.After, "after", 0, "begin after the event with this `ID`")
	cmd.Flags().BoolVar(&o.All, "all", false, "begin with the oldest that is kept")
	return cmd
}

func (a *app) printEvent(e api.Event) error {
	if a.output == "json" {
		return json.NewEncoder(a.stdio.Out).Encode(e)
	}
	data, err := json.Marshal(e.Data)
	if err != nil {
		return err
	}
	line := fmt.Sprintf("%s  %-6d  %-20s  %s  %s", e.CreatedAt.Local().Format("15:04:05.000"), e.ID, e.Type, e.Subject, strings.Trim(string(data), "{}"))
	_, err = fmt.Fprintln(a.stdio.Out, clean(line))
	return err
}
