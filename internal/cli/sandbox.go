package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

func (a *app) sandboxCommand() *cobra.Command {
	cmd := group("sandbox", "Create and use sandboxes", "sb", "sandboxes")
	cmd.Long = "Create and use sandboxes. Wherever a SANDBOX is asked for, its id or its name will do."
	cmd.AddCommand(a.createCommand(), a.listCommand(), a.getCommand(), a.pauseCommand(), a.resumeCommand(), a.removeCommand(),
		a.forkCommand(), a.checkpointCommand(), a.rollbackCommand(), a.storageCommand(),
		a.execCommand(), a.shellCommand(), a.copyCommand(), a.psCommand(), a.killCommand(), a.timeoutCommand())
	return cmd
}

func (a *app) createCommand() *cobra.Command {
	var o wrenn.SandboxOptions
	var memory, disk string
	var idle time.Duration
	var env, metadata []string
	var onTimeout string
	cmd := &cobra.Command{
		Use:   "create [TEMPLATE]",
		Short: "Create a sandbox and print its id",
		Long:  "Creates a sandbox from a template (minimal if none is named; `wrenn template ls` shows them) and prints its id when it takes commands.",
		Example: `  wrenn sandbox create
  wrenn sandbox create base --name ci --cpus 2 --memory 2G --disk 8G
  wrenn sandbox create base -e TOKEN=abc --metadata team=blue --timeout 30m --auto-resume
  wrenn sandbox create --from chk-h2k7x0w9m4q1z8c5v3b6n2a1s
  id=$(wrenn sandbox create base) && wrenn sandbox exec $id -- python3 -V`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usagef("a sandbox is created from one template, not from %q", args)
			}
			return nil
		},
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				o.Template = args[0]
			}
			o.TimeoutSec, o.OnTimeout = int32(idle/time.Second), api.OnTimeout(onTimeout)
			if err := errors.Join(pairs("--env", env, (*map[string]string)(&o.Env)), pairs("--metadata", metadata, (*map[string]string)(&o.Metadata)),
				megabytesOf("--memory", memory, &o.MemoryMB), megabytesOf("--disk", disk, &o.DiskMB)); err != nil {
				return err
			}
			return a.create(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Name, "name", "", "`NAME` to know it by")
	f.Int32Var(&o.Vcpus, "cpus", 0, "virtual CPUs (1)")
	f.StringVar(&memory, "memory", "", "memory, such as 512M or 2G; a bare number is MB (512M)")
	f.StringVar(&disk, "disk", "", "disk, such as 8G (the template's)")
	f.DurationVar(&idle, "timeout", 0, "idle time after which --on-timeout happens, such as 30m (never)")
	f.StringVar(&onTimeout, "on-timeout", "", "pause or kill (pause)")
	f.BoolVar(&o.AutoResume, "auto-resume", false, "commands, files and processes wake it when it is paused")
	f.StringVar(&o.From, "from", "", "`CHECKPOINT` to begin with, instead of a template")
	f.BoolVar(&o.DiskOnly, "disk-only", false, "leave the memory of the checkpoint or snapshot and boot its disk")
	f.StringArrayVarP(&env, "env", "e", nil, "`NAME=VALUE` for every command; may be repeated")
	f.StringArrayVarP(&metadata, "metadata", "m", nil, "label `KEY=VALUE`; may be repeated")
	f.StringVarP(&o.User, "user", "u", "", "default user of commands and files (the template's)")
	return cmd
}

func (a *app) create(ctx context.Context, o wrenn.SandboxOptions) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	ctx, done := a.showing(ctx, "creating the sandbox")
	sb, err := c.CreateSandbox(ctx, o)
	done()
	if err != nil {
		return err
	}
	return a.print(sb.Sandbox, func(w io.Writer) { fmt.Fprintln(w, sb.ID) })
}

// pairs reads NAME=VALUE arguments.
func pairs(flag string, list []string, to *map[string]string) error {
	for _, item := range list {
		k, v, ok := strings.Cut(item, "=")
		if !ok || k == "" {
			return usagef("%s is %q; it must be like NAME=VALUE", flag, item)
		}
		if *to == nil {
			*to = map[string]string{}
		}
		(*to)[k] = v
	}
	return nil
}

// megabytesOf reads a size: a number with M, G or T (and an optional B or iB), or of MB.
func megabytesOf(flag, text string, to *int32) error {
	if text == "" {
		return nil
	}
	number := strings.TrimRight(strings.ToUpper(text), "MGTIB")
	unit := strings.TrimRight(strings.ToUpper(text)[len(number):], "IB")
	shift, ok := map[string]int{"": 0, "M": 0, "G": 10, "T": 20}[unit]
	n, err := strconv.ParseInt(number, 10, 32)
	if err != nil || !ok || n <= 0 || n<<shift > 1<<30 {
		return usagef("%s is %q; it must be like 512M or 2G", flag, text)
	}
	*to = int32(n << shift)
	return nil
}

func (a *app) listCommand() *cobra.Command {
	var f wrenn.SandboxFilter
	var status string
	var metadata []string
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List sandboxes", Args: noArgs,
		Example: `  wrenn sandbox ls
  wrenn sandbox ls --status running -m team=blue
  wrenn sandbox ls -q | xargs -r wrenn sandbox rm`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.Status = api.SandboxStatus(status)
			if err := pairs("--metadata", metadata, &f.Metadata); err != nil {
				return err
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			list := []api.Sandbox{}
			for sb, err := range c.Sandboxes(cmd.Context(), f) {
				if err != nil {
					return err
				}
				list = append(list, sb.Sandbox)
			}
			return a.print(list, func(w io.Writer) { printSandboxes(w, list, quiet) })
		},
	}
	cmd.Flags().StringVar(&status, "status", "", "only those with this `STATUS`")
	cmd.Flags().StringVar(&f.Template, "template", "", "only those of this `TEMPLATE`")
	cmd.Flags().StringVar(&f.Name, "name", "", "only those with this `NAME`")
	cmd.Flags().StringVar(&f.HostID, "host", "", "only those on this `HOST`")
	cmd.Flags().StringArrayVarP(&metadata, "metadata", "m", nil, "only those with this label `KEY=VALUE`; may be repeated")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "ids only")
	return cmd
}

func printSandboxes(w io.Writer, list []api.Sandbox, quiet bool) {
	if quiet {
		for _, s := range list {
			fmt.Fprintln(w, s.ID)
		}
		return
	}
	rows := make([][]string, len(list))
	for i, s := range list {
		rows[i] = []string{s.ID, s.Name, statusOf(s), s.Template, strconv.Itoa(int(s.Vcpus)), megabytes(int64(s.MemoryMB)),
			megabytes(int64(s.DiskMB)), age(s.CreatedAt)}
	}
	table(w, []string{"ID", "NAME", "STATUS", "TEMPLATE", "CPUS", "MEMORY", "DISK", "AGE"}, rows)
}

// statusOf says more than the status where that is the last that was known.
func statusOf(s api.Sandbox) string {
	if !s.HostOnline {
		return string(s.Status) + " (host offline)"
	}
	return string(s.Status)
}

func (a *app) getCommand() *cobra.Command {
	return &cobra.Command{
		Use: "get SANDBOX", Short: "Show a sandbox", Args: exactArgs("a SANDBOX"), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(sb.Sandbox, func(w io.Writer) { printSandbox(w, sb.Sandbox) })
		},
	}
}

func printSandbox(w io.Writer, s api.Sandbox) {
	labels := make([]string, 0, len(s.Metadata))
	for k, v := range s.Metadata {
		labels = append(labels, k+"="+v)
	}
	timeout := "never"
	if s.TimeoutSec > 0 {
		timeout = fmt.Sprintf("%s after %v without activity", s.OnTimeout, time.Duration(s.TimeoutSec)*time.Second)
	}
	fields(w, "id", s.ID, "name", s.Name, "status", statusOf(s), "reason", s.Reason, "template", s.Template, "user", s.User,
		"cpus", strconv.Itoa(int(s.Vcpus)), "memory", megabytes(int64(s.MemoryMB)), "disk", megabytes(int64(s.DiskMB)),
		"timeout", timeout, "auto-resume", yes(s.AutoResume), "from", s.From, "durable since", moment(s.DurableAt), "metadata", strings.Join(labels, " "), "host", s.HostID, "created", moment(s.CreatedAt),
		"started", moment(s.StartedAt), "last active", moment(s.LastActiveAt))
}

// yes says so, or nothing.
func yes(b bool) string {
	if b {
		return "yes"
	}
	return ""
}

// find gets a sandbox by id or name.
func (a *app) find(ctx context.Context, ref string) (*wrenn.Sandbox, error) {
	c, err := a.connect()
	if err != nil {
		return nil, err
	}
	return c.FindSandbox(ctx, ref)
}

func (a *app) removeCommand() *cobra.Command {
	var all, yes bool
	cmd := &cobra.Command{
		Use: "rm SANDBOX…", Aliases: []string{"delete"}, Short: "Delete sandboxes with their disks",
		Example: `  wrenn sandbox rm sb-h2k7x0w9m4q1z8c5v3b6n2a1s
  wrenn sandbox rm --all --yes`,
		ValidArgsFunction: a.completeSandbox,
		Args: func(_ *cobra.Command, args []string) error {
			if (len(args) == 0) != all {
				return usagef("wrenn sandbox rm needs sandboxes, or --all")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			if all {
				if args, err = a.everySandbox(cmd.Context(), c, yes); err != nil {
					return err
				}
			}
			return a.remove(cmd.Context(), c, args)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every sandbox of the team")
	cmd.Flags().BoolVar(&yes, "yes", false, "with --all, do not ask")
	return cmd
}

func (a *app) everySandbox(ctx context.Context, c *wrenn.Client, yes bool) ([]string, error) {
	var ids []string
	for sb, err := range c.Sandboxes(ctx, wrenn.SandboxFilter{}) {
		if err != nil {
			return nil, err
		}
		ids = append(ids, sb.ID)
	}
	if len(ids) == 0 || yes {
		return ids, nil
	}
	return ids, a.confirm(fmt.Sprintf("This deletes %d sandboxes with their disks.", len(ids)))
}

// remove deletes all that are named, also after one could not be.
func (a *app) remove(ctx context.Context, c *wrenn.Client, refs []string) error {
	deleted := []string{}
	var errs []error
	for _, ref := range refs {
		sb, err := c.FindSandbox(ctx, ref)
		done := true
		if err == nil {
			done, err = sb.Delete(ctx)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		deleted = append(deleted, sb.ID)
		if !done {
			a.note("The host of %s cannot be reached; it is deleted as soon as it is back", sb.ID)
		}
		if a.output != "json" {
			fmt.Fprintln(a.stdio.Out, sb.ID)
		}
	}
	if a.output == "json" {
		errs = append(errs, a.print(map[string]any{"deleted": deleted}, nil))
	}
	return errors.Join(errs...)
}

func (a *app) timeoutCommand() *cobra.Command {
	var then string
	cmd := &cobra.Command{
		Use: "timeout SANDBOX DURATION", Short: "Set the idle timeout; 0 means never",
		Example: "  wrenn sandbox timeout ci 30m --on-timeout kill",
		Args:    exactArgs("a SANDBOX", "a DURATION such as 30m"), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			idle, err := time.ParseDuration(args[1])
			if err != nil && args[1] != "0" {
				return usagef("%q is no duration; it must be like 90s, 30m or 2h", args[1])
			}
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := sb.SetTimeout(cmd.Context(), idle, api.OnTimeout(then)); err != nil {
				return err
			}
			return a.print(sb.Sandbox, func(w io.Writer) { printSandbox(w, sb.Sandbox) })
		},
	}
	cmd.Flags().StringVar(&then, "on-timeout", "", "pause or kill")
	return cmd
}

func (a *app) templateCommand() *cobra.Command {
	cmd := group("template", "See what sandboxes can be made from", "templates")
	cmd.AddCommand(&cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List templates", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			list, err := c.Templates(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) {
				rows := make([][]string, len(list))
				for i, t := range list {
					rows[i] = []string{t.Name, string(t.Scope), megabytes(t.DiskMB), t.DefaultUser, age(t.UpdatedAt)}
				}
				table(w, []string{"NAME", "SCOPE", "DISK", "USER", "AGE"}, rows)
			})
		},
	})
	return cmd
}
