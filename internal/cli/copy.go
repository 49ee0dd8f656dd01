package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

func (a *app) copyCommand() *cobra.Command {
	var user string
	cmd := &cobra.Command{
		Use:   "cp SOURCE DESTINATION",
		Short: "Copy files and directories to and from a sandbox",
		Long: `Copies a file or a directory with all in it. One side is SANDBOX:PATH, a path in a sandbox, relative to the
user's home unless it begins with /; the other is a path here, or - for standard input or output. A destination that is a
directory takes the source into it. Nothing is held in memory, so files may be of any size.`,
		Example: `  wrenn sandbox cp main.py ci:
  wrenn sandbox cp src ci:/srv/app
  wrenn sandbox cp ci:/var/log/app.log .
  pg_dump db | wrenn sandbox cp - ci:dump.sql`,
		Args: exactArgs("a SOURCE", "a DESTINATION"),
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
			return a.sandboxNames(cmd.Context(), prefix, ":"), cobra.ShellCompDirectiveNoSpace
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			from, to := parseSide(args[0]), parseSide(args[1])
			if (from.sandbox == "") == (to.sandbox == "") {
				return usagef("one side must be SANDBOX:PATH and the other a path here (write ./a:b for a file with a colon)")
			}
			sb, err := a.find(cmd.Context(), from.sandbox+to.sandbox)
			if err != nil {
				return err
			}
			c := &copier{app: a, sandbox: sb, files: sb.Files().As(user), user: user, began: time.Now()}
			defer c.finish()
			if from.sandbox != "" {
				return c.download(cmd.Context(), from.path, to.path)
			}
			return c.upload(cmd.Context(), from.path, to.path)
		},
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "as this `USER` of the sandbox")
	return cmd
}

// side is SANDBOX:PATH or a path here.
type side struct{ sandbox, path string }

func parseSide(s string) side {
	name, rest, ok := strings.Cut(s, ":")
	if !ok || name == "" || strings.ContainsAny(name, `/\`) || strings.HasPrefix(name, ".") {
		return side{path: s}
	}
	if rest == "" {
		rest = "."
	}
	return side{sandbox: name, path: rest}
}

// copier is one copy.
type copier struct {
	*app
	sandbox *wrenn.Sandbox
	files   wrenn.Files
	user    string

	began time.Time
	shown time.Time
	bytes int64
	total int64
}

// remoteDir tells whether there is a directory at a path of the sandbox.
func (c *copier) remoteDir(ctx context.Context, p string) (bool, error) {
	info, err := c.files.Stat(ctx, p)
	if wrenn.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return info.Type == api.FileEntryTypeDirectory, nil
}

func (c *copier) upload(ctx context.Context, from, to string) error {
	if from == "-" {
		_, err := c.files.Write(ctx, to, c.count(c.stdio.In, 0))
		return err
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	into, err := c.remoteDir(ctx, to)
	if err != nil {
		return err
	}
	if into || strings.HasSuffix(to, "/") {
		to = path.Join(to, localName(from))
	}
	if info.IsDir() {
		return c.uploadDir(ctx, from, to)
	}
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := c.files.Write(ctx, to, c.count(f, info.Size())); err != nil {
		return err
	}
	return c.executable(ctx, info, to)
}

// executable carries over the one bit of the mode that matters.
func (c *copier) executable(ctx context.Context, info os.FileInfo, to string) error {
	if info.Mode().Perm()&0o100 == 0 {
		return nil
	}
	res, err := c.sandbox.ExecWith(ctx, wrenn.ExecOptions{Cmd: "chmod", Args: []string{"+x", "--", to}, User: c.user})
	if err != nil {
		return err
	}
	if res.ExitCode != 0 {
		return fmt.Errorf("%s was copied, but could not be made executable: %s", to, strings.TrimSpace(string(res.Stderr)))
	}
	return nil
}

// localName is the name under which something arrives in a directory.
func localName(p string) string {
	if abs, err := filepath.Abs(p); err == nil {
		return filepath.Base(abs)
	}
	return filepath.Base(p)
}

func (c *copier) download(ctx context.Context, from, to string) error {
	info, err := c.files.Stat(ctx, from)
	if err != nil {
		return err
	}
	if local, err := os.Stat(to); to != "-" && err == nil && local.IsDir() {
		name := path.Base(info.Path)
		if !filepath.IsLocal(name) || strings.ContainsRune(name, os.PathSeparator) {
			return fmt.Errorf("%q is no name for a file here: say what to call it", name)
		}
		to = filepath.Join(to, name)
	}
	if info.Type == api.FileEntryTypeDirectory {
		if to == "-" {
			return usagef("%s is a directory, which cannot go to standard output", from)
		}
		return c.downloadDir(ctx, info.Path, to)
	}
	r, err := c.files.Open(ctx, from)
	if err != nil {
		return err
	}
	defer r.Close()
	if to == "-" {
		_, err = io.Copy(c.stdio.Out, r)
		return err
	}
	return c.receive(r, to, os.FileMode(info.Mode).Perm())
}

// receive writes a file under another name first: what was there stays until all has come.
func (c *copier) receive(r *wrenn.Reader, to string, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(to), "."+filepath.Base(to)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	n, err := io.Copy(tmp, c.count(r, r.Size))
	if err == nil && r.Size >= 0 && n != r.Size {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		err = tmp.Chmod(mode & 0o755)
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("copying %s: %w", to, err)
	}
	return os.Rename(tmp.Name(), to)
}

// count shows how much has passed through r, of total bytes if that is known.
func (c *copier) count(r io.Reader, total int64) io.Reader {
	c.total = max(total, 0)
	counted := &countingReader{Reader: r, copier: c}
	if total > 0 {
		return sizedReader{counted, total}
	}
	return counted
}

type countingReader struct {
	io.Reader
	copier *copier
}

func (r *countingReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.copier.progress(n)
	return n, err
}

// sizedReader tells the length of what comes, so that it is sent with the request.
type sizedReader struct {
	io.Reader
	size int64
}

// Len makes the length known to the client.
func (r sizedReader) Len() int { return int(r.size) }

const progressEvery = 200 * time.Millisecond

func (c *copier) progress(n int) {
	c.bytes += int64(n)
	f, live := terminal(c.stdio.Err)
	if !live || c.output == "json" || time.Since(c.shown) < progressEvery || time.Since(c.began) < time.Second {
		return
	}
	c.shown = time.Now()
	of := ""
	if c.total > 0 {
		of = fmt.Sprintf(" of %s (%d%%)", size(c.total), c.bytes*100/c.total)
	}
	fmt.Fprintf(f, "\r\033[K  %s%s, %s/s", size(c.bytes), of, size(int64(float64(c.bytes)/time.Since(c.began).Seconds())))
}

func (c *copier) finish() {
	if !c.shown.IsZero() {
		fmt.Fprintf(c.stdio.Err, "\r\033[K  %s in %.1fs\n", size(c.bytes), time.Since(c.began).Seconds())
	}
}
