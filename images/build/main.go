// Command build makes what a guest boots from: kernel, initramfs and root file systems, from Debian
// packages, without containers and without mounting anything. The same packages give the same bytes.
// It owns the recipes; what happens inside a guest is internal/envd's.
//
//	build [flags] [image …]      make what is missing or out of date (default: all images)
//	build inject [flags] FILE    put a fresh guest agent into one image and update its manifest
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

// builder is one run.
type builder struct {
	images  string // directory of NAME.ext4 and NAME.json
	kernels string // directory of vmlinuz and initramfs.img
	envd    string // the guest agent's program
	force   bool
	mu      sync.Mutex // of out
	out     io.Writer
	started time.Time
}

func run(ctx context.Context, args []string, out io.Writer) error {
	// Debian keeps mke2fs and debugfs where an ordinary user's PATH does not look.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin"); err != nil {
		return err
	}
	b := &builder{out: out, started: time.Now()}
	inject := len(args) > 0 && args[0] == "inject"
	if inject {
		args = args[1:]
	}
	flags := flag.NewFlagSet("build", flag.ContinueOnError)
	flags.SetOutput(out)
	flags.StringVar(&b.images, "images", ".wrenn/images", "directory for NAME.ext4 and NAME.json")
	flags.StringVar(&b.kernels, "kernels", ".wrenn/kernels", "directory for vmlinuz and initramfs.img")
	flags.StringVar(&b.envd, "envd", "builds/envd", "the guest agent, a static binary")
	flags.BoolVar(&b.force, "force", false, "make everything again")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if _, err := os.Stat(b.envd); err != nil {
		return fmt.Errorf("the guest agent %s is not there; run `make build-envd` first", b.envd)
	}
	if inject {
		if flags.NArg() != 1 {
			return errors.New("inject takes the path of one image")
		}
		return b.inject(ctx, flags.Arg(0))
	}
	return b.build(ctx, flags.Args())
}

func (b *builder) build(ctx context.Context, names []string) error {
	var wanted []recipe
	for _, r := range recipes() {
		if len(names) == 0 || slices.Contains(names, r.name) {
			wanted = append(wanted, r)
		}
	}
	if len(wanted) == 0 || (len(names) > 0 && len(wanted) != len(names)) {
		return fmt.Errorf("no such image among %v", names)
	}
	for _, dir := range []string{b.images, b.kernels} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	kernel, err := b.kernel(ctx)
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	if err := b.initramfs(); err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	// Side by side: installing packages waits for the network, the disk and one CPU in turn.
	failed := make(chan error)
	for _, r := range wanted {
		go func() {
			err := b.image(ctx, r, kernel)
			if err != nil {
				err = fmt.Errorf("image %s: %w", r.name, err)
			}
			failed <- err
		}()
	}
	alive := time.NewTicker(stillEvery)
	defer alive.Stop()
	for done := 0; done < len(wanted); {
		select {
		case e := <-failed:
			err = errors.Join(err, e)
			done++
		case <-alive.C: // installing hundreds of packages says nothing for minutes
			b.step("… %d of %d in the making", len(wanted)-done, len(wanted))
		}
	}
	return err
}

// stillEvery is how often a long build gives a sign of life.
const stillEvery = 15 * time.Second

// step tells what is being done, with the time since the start.
func (b *builder) step(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	fmt.Fprintf(b.out, "[%5.1fs] images: %s\n", time.Since(b.started).Seconds(), fmt.Sprintf(format, args...))
}

func (b *builder) imagePath(name string) string    { return filepath.Join(b.images, name+".ext4") }
func (b *builder) manifestPath(name string) string { return filepath.Join(b.images, name+".json") }
