package controlplane

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/api"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/version"
)

// Run is the program wrenn-cp.
func Run(ctx context.Context, args []string, env func(string) string, stdio Stdio) error {
	root := &cobra.Command{
		Use:           "wrenn-cp",
		Short:         "The control plane of Wrenn: REST API, identity, placement",
		Long:          "The control plane of Wrenn: REST API, identity, placement.\n\nWithout a command it migrates the database and serves. Everything is configured by the environment:\n\n" + help(),
		Version:       version.Version,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(env)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), cfg, stdio)
		},
	}
	root.AddCommand(migrateCommand(env, stdio), adminCommand(env, stdio))
	root.SetArgs(args)
	root.SetIn(stdio.In)
	root.SetOut(stdio.Out)
	root.SetErr(stdio.Err)
	return root.ExecuteContext(ctx)
}

func help() string {
	var out strings.Builder
	for _, s := range settings {
		fmt.Fprintf(&out, "  %-22s %s\n", s[0], s[1])
	}
	return out.String()
}

func migrateCommand(env func(string) string, stdio Stdio) *cobra.Command {
	return &cobra.Command{
		Use:   "migrate",
		Short: "Bring the database's schema up to date and exit",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			url, err := databaseURL(env)
			if err != nil {
				return err
			}
			return migrate(cmd.Context(), url, slog.New(slog.NewTextHandler(stdio.Err, nil)))
		},
	}
}

func adminCommand(env func(string) string, stdio Stdio) *cobra.Command {
	admin := &cobra.Command{Use: "admin", Short: "Manage admins of the platform"}
	var email string
	var fromStdin bool
	create := &cobra.Command{
		Use:   "create --email you@example.com [--password-stdin]",
		Short: "Make an admin, or make an existing account one with a new password",
		Long:  "Makes an admin, or makes an existing account one with a new password. Without --password-stdin a password is made and printed.",
		Example: "  wrenn-cp admin create --email ada@example.com\n" +
			"  echo \"$PASSWORD\" | wrenn-cp admin create --email ada@example.com --password-stdin",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return createAdmin(cmd.Context(), env, stdio, email, fromStdin)
		},
	}
	create.Flags().StringVar(&email, "email", "", "the admin's email")
	create.Flags().BoolVar(&fromStdin, "password-stdin", false, "read the password from standard input")
	_ = create.MarkFlagRequired("email") // the flag exists
	admin.AddCommand(create)
	return admin
}

const (
	minPassword = 8
	maxPassword = 256
)

func createAdmin(ctx context.Context, env func(string) string, stdio Stdio, email string, fromStdin bool) error {
	url, err := databaseURL(env)
	if err != nil {
		return err
	}
	email = strings.ToLower(strings.TrimSpace(email))
	if at := strings.IndexByte(email, '@'); at < 1 || at == len(email)-1 || len(email) > 254 || strings.ContainsAny(email, " \t\r\n\x00") {
		return fmt.Errorf("--email %q is not an email address", email)
	}
	password := rand.Text()
	if fromStdin {
		if password, err = readPassword(stdio.In); err != nil {
			return err
		}
	}
	if err := migrate(ctx, url, slog.New(slog.NewTextHandler(stdio.Err, &slog.HandlerOptions{Level: slog.LevelWarn}))); err != nil {
		return err
	}
	st, err := store.Open(ctx, url)
	if err != nil {
		return err
	}
	defer st.Close()
	hash, err := auth.NewPasswords().Hash(ctx, password)
	if err != nil {
		return err
	}
	if err := makeAdmin(ctx, st, email, hash); err != nil {
		return err
	}
	fmt.Fprintf(stdio.Out, "admin %s is ready\n", email)
	if !fromStdin {
		fmt.Fprintf(stdio.Out, "password: %s\n", password)
	}
	return nil
}

func makeAdmin(ctx context.Context, st *store.Store, email, hash string) error {
	u, err := st.UserByEmail(ctx, email)
	if store.IsNotFound(err) {
		_, _, err = api.NewAccount(ctx, st, api.Account{Email: email, PasswordHash: hash, IsAdmin: true}, "")
		return err
	} else if err != nil {
		return err
	}
	return st.Tx(ctx, func(tx store.Tx) error {
		if err := tx.MakeAdmin(ctx, db.MakeAdminParams{ID: u.ID, PasswordHash: hash}); err != nil {
			return err
		}
		return tx.InsertAudit(ctx, db.InsertAuditParams{ActorType: "system", ActorID: "system", Action: "user.make_admin", Subject: u.ID, Details: []byte(`{}`)})
	})
}

func readPassword(in io.Reader) (string, error) {
	line, err := bufio.NewReader(io.LimitReader(in, maxPassword+2)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	line = strings.TrimRight(line, "\r\n")
	if len(line) < minPassword || len(line) > maxPassword {
		return "", fmt.Errorf("the password must have %d to %d bytes", minPassword, maxPassword)
	}
	return line, nil
}
