package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
)

// finding is one row of `wrenn-agent doctor`.
type finding struct {
	what   string
	level  string // ok, note (works, worse than it could), fail (sandboxes cannot run)
	detail string
	mend   string
}

const (
	ok   = "ok"
	note = "note"
	fail = "FAIL"
)

func doctorCommand(getenv func(string) string) *cobra.Command {
	var again bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Tell whether this host can run sandboxes, and how to mend what is wrong",
		Long:  "Checks what sandboxes need. Changes nothing but the cached verdicts on KVM and Firecracker. Exits with 1 if sandboxes cannot run here.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(getenv)
			if err != nil {
				return err
			}
			if again {
				if err := forgetVerdicts(cfg); err != nil {
					return err
				}
			}
			return printFindings(cmd.OutOrStdout(), examine(cmd.Context(), cfg))
		},
	}
	cmd.Flags().BoolVar(&again, "again", false, "try anew whether Firecracker and KVM boot our kernel; the agent takes the verdict at its next start")
	return cmd
}

func forgetVerdicts(cfg Config) error {
	for _, path := range []string{cfg.verdictFile(), cfg.firecrackerFile()} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func examine(ctx context.Context, cfg Config) []finding {
	all := []finding{rights()}
	all = append(all, hypervisor(ctx, cfg)...)
	all = append(all, kernelFiles(cfg)...)
	return append(all, imageFiles(cfg), disk(cfg), nftables(ctx), forwarding(cfg), registered(cfg))
}

func printFindings(w io.Writer, all []finding) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CHECK\tRESULT\tDETAIL\tHOW TO MEND")
	failed := 0
	for _, f := range all {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", f.what, f.level, f.detail, f.mend)
		if f.level == fail {
			failed++
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if failed > 0 {
		return fmt.Errorf("sandboxes cannot run on this host: %d of %d checks failed", failed, len(all))
	}
	return nil
}

func rights() finding {
	if os.Geteuid() != 0 {
		return finding{"rights", fail, "not root", "run with sudo"}
	}
	return finding{"rights", ok, "root", ""}
}

func kernelFiles(cfg Config) []finding {
	const mend = "make images, or set AGENT_KERNEL_PATH"
	info, err := os.Stat(cfg.Kernel)
	if err != nil {
		return []finding{{"kernel", fail, cfg.Kernel + " is not there", mend}}
	}
	kernel := finding{"kernel", ok, fmt.Sprintf("%s, %d MiB", cfg.Kernel, info.Size()>>20), ""}
	switch {
	case cfg.Initrd == "":
		return []finding{kernel, {"initramfs", note, "none; the kernel must have virtio and ext4 built in", "make images, or set AGENT_INITRD_PATH"}}
	case !exists(cfg.Initrd):
		return []finding{kernel, {"initramfs", fail, cfg.Initrd + " is not there", mend}}
	}
	return []finding{kernel, {"initramfs", ok, cfg.Initrd, ""}}
}

func imageFiles(cfg Config) finding {
	imgs, err := (&images{dir: cfg.Images, log: slog.New(slog.DiscardHandler)}).list()
	if err != nil || len(imgs) == 0 {
		return finding{"images", fail, "no image in " + cfg.Images, "make images, or put NAME.ext4 there"}
	}
	var names []string
	for _, i := range imgs {
		names = append(names, fmt.Sprintf("%s (%d MiB)", i.Name, i.DiskMB()))
	}
	return finding{"images", ok, strings.Join(names, ", "), ""}
}

func disk(cfg Config) finding {
	const mend = "free space on the file system of AGENT_SANDBOXES_PATH"
	dir := cfg.Sandboxes
	for !exists(dir) {
		dir = filepath.Dir(dir)
	}
	free, reflinks, err := storage.Look(dir)
	if err != nil {
		return finding{"disk", fail, err.Error(), mend}
	}
	size := fmt.Sprintf("%s: %d GiB free", cfg.Sandboxes, free>>30)
	switch {
	case free < 1<<30:
		return finding{"disk", fail, size, mend}
	case reflinks:
		return finding{"disk", ok, size + ", reflinks", ""}
	case cfg.Storage == storage.ModeAuto:
		return finding{"disk", ok, size + ", no reflinks: an XFS volume file will be mounted there", ""}
	case cfg.Storage == storage.ModeReflink:
		return finding{"disk", fail, size + ", no reflinks, but AGENT_STORAGE=reflink", "use XFS or Btrfs, or AGENT_STORAGE=auto"}
	}
	return finding{"disk", note, size + ", no reflinks: every sandbox is a full copy", "use XFS or Btrfs, or AGENT_STORAGE=auto"}
}

func nftables(ctx context.Context) finding {
	out, err := exec.CommandContext(ctx, "nft", "--version").Output()
	if err != nil {
		return finding{"nftables", fail, "nft does not run", "apt-get install nftables"}
	}
	return finding{"nftables", ok, strings.TrimSpace(string(out)), ""}
}

func forwarding(cfg Config) finding {
	if cfg.Egress == network.EgressNone {
		return finding{"egress", ok, "none: sandboxes reach nothing", ""}
	}
	raw, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err != nil || strings.TrimSpace(string(raw)) != "1" {
		return finding{"egress", note, "internet; net.ipv4.ip_forward is off, the agent will turn it on", "sysctl -w net.ipv4.ip_forward=1"}
	}
	return finding{"egress", ok, "internet; net.ipv4.ip_forward is on", ""}
}

func registered(cfg Config) finding {
	id, err := loadIdentity(cfg.TokenFile)
	switch {
	case err == nil:
		return finding{"registration", ok, id.HostID, ""}
	case !errors.Is(err, os.ErrNotExist) && exists(cfg.TokenFile):
		return finding{"registration", fail, err.Error(), "delete the host in the control plane and register again"}
	}
	return finding{"registration", note, "not registered yet", "start with --register TOKEN --address IP:PORT"}
}
