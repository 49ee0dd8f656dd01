package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

func (a *app) loginCommand() *cobra.Command {
	var email string
	var fromStdin, keyFromStdin bool
	cmd := &cobra.Command{
		Use:   "login [URL]",
		Short: "Log in to a control plane",
		Long: `Asks for email and password, makes an API key for this machine and keeps both key and login in
~/.config/wrenn/config.json, which only you can read. The login, which managing hosts and keys takes, is good for six
hours; the key, which sandboxes take, until ` + "`wrenn logout`" + `.

Without URL it is WRENN_API_URL, else the control plane of this machine.`,
		Example: `  wrenn login https://wrenn.example.com
  wrenn login https://wrenn.example.com --email ada@example.com --password-stdin < password
  wrenn login https://wrenn.example.com --api-key-stdin < key`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usagef("wrenn login takes one URL")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			acc := &account{URL: a.getenv("WRENN_API_URL"), Email: email}
			if len(args) == 1 {
				acc.URL = args[0]
			}
			if acc.URL == "" {
				acc.URL = wrenn.DefaultURL
			}
			if !strings.Contains(acc.URL, "://") {
				acc.URL = "https://" + acc.URL
			}
			if keyFromStdin {
				return a.loginWithKey(cmd.Context(), acc)
			}
			return a.login(cmd.Context(), acc, fromStdin)
		},
	}
	cmd.Flags().StringVar(&email, "email", "", "`EMAIL` of the account")
	cmd.Flags().BoolVar(&fromStdin, "password-stdin", false, "read the password from standard input")
	cmd.Flags().BoolVar(&keyFromStdin, "api-key-stdin", false, "read an API key from standard input instead of logging in")
	return cmd
}

func (a *app) login(ctx context.Context, acc *account, fromStdin bool) error {
	in := bufio.NewReader(a.stdio.In)
	if acc.Email == "" {
		if fromStdin {
			return usagef("--password-stdin needs --email")
		}
		fmt.Fprintf(a.stdio.Err, "Log in to %s\nEmail: ", acc.URL)
		line, err := in.ReadString('\n')
		if acc.Email = strings.TrimSpace(line); acc.Email == "" {
			return errors.Join(usagef("no email was given"), ignoreEOF(err))
		}
	}
	password, err := a.askPassword(in, fromStdin)
	if err != nil {
		return err
	}
	c, err := acc.client()
	if err != nil {
		return err
	}
	session, err := c.Login(ctx, acc.Email, password)
	if err != nil {
		return err
	}
	acc.Token, acc.Expires = session.Token, session.ExpiresAt
	host, err := os.Hostname()
	if err != nil {
		host = "unknown host"
	}
	key, err := c.CreateKey(ctx, "wrenn login on "+host)
	if err != nil {
		return err
	}
	acc.APIKey, acc.KeyID = key.Key, key.ID
	return a.keep(acc, "Logged in as "+session.User.Email)
}

func (a *app) loginWithKey(ctx context.Context, acc *account) error {
	line, err := bufio.NewReader(a.stdio.In).ReadString('\n')
	if acc.APIKey = strings.TrimSpace(line); acc.APIKey == "" {
		return errors.Join(usagef("standard input holds no API key"), ignoreEOF(err))
	}
	c, err := acc.client()
	if err != nil {
		return err
	}
	if _, err := c.Templates(ctx); err != nil {
		return err
	}
	return a.keep(acc, "The API key is good")
}

// askPassword reads a password, from a terminal without showing it.
func (a *app) askPassword(in *bufio.Reader, fromStdin bool) (string, error) {
	f, isTerminal := terminal(a.stdio.In)
	if !fromStdin && !isTerminal {
		return "", usagef("there is no terminal to ask for the password: use --password-stdin")
	}
	if fromStdin {
		line, err := in.ReadString('\n')
		if line = strings.TrimRight(line, "\r\n"); line == "" {
			return "", errors.Join(usagef("standard input holds no password"), ignoreEOF(err))
		}
		return line, nil
	}
	fmt.Fprint(a.stdio.Err, "Password: ")
	raw, err := term.ReadPassword(int(f.Fd()))
	fmt.Fprintln(a.stdio.Err)
	return string(raw), err
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (a *app) keep(acc *account, what string) error {
	path, err := a.configFile()
	if err != nil {
		return err
	}
	if err := writePrivate(path, acc); err != nil {
		return fmt.Errorf("keeping the login: %w", err)
	}
	a.note("%s at %s; kept in %s", what, acc.URL, path)
	if a.getenv("WRENN_API_KEY") != "" || a.getenv("WRENN_API_URL") != "" {
		a.note("WRENN_API_URL or WRENN_API_KEY is set in this shell and goes before it: unset them to use this login")
	}
	return nil
}

func (a *app) logoutCommand() *cobra.Command {
	return &cobra.Command{
		Use: "logout", Short: "Forget the login and revoke its API key", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := a.configFile()
			if err != nil {
				return err
			}
			if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
				a.note("There is no login on this machine")
				return nil
			}
			acc, err := a.account()
			if err == nil && acc.source == path && acc.KeyID != "" {
				err = a.asUser(cmd.Context(), func(c *wrenn.Client) error { return c.DeleteKey(cmd.Context(), acc.KeyID) })
				if err != nil && !wrenn.IsNotFound(err) {
					a.note("The API key %s could not be revoked (%v); do that with `wrenn key rm`", acc.KeyID, err)
				}
			}
			return os.Remove(path)
		},
	}
}
