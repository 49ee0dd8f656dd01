package cli

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

func (a *app) hostCommand() *cobra.Command {
	cmd := group("host", "Manage the machines that run sandboxes", "hosts")
	cmd.AddCommand(a.hostCreateCommand(), a.hostListCommand(), a.hostGetCommand(), a.hostTokenCommand(), a.tagCommand())
	cmd.AddCommand(&cobra.Command{
		Use: "rm HOST…", Short: "Delete hosts that have no sandboxes", Args: atLeast("a HOST"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.asUser(cmd.Context(), func(c *wrenn.Client) error {
				return a.each(args, func(id string) error { return c.DeleteHost(cmd.Context(), id) })
			})
		},
	})
	return cmd
}

// each does something for every id, also after one failed, and prints the ids that went well.
func (a *app) each(ids []string, do func(id string) error) error {
	deleted := []string{}
	var errs []error
	for _, id := range ids {
		if err := do(id); err != nil {
			errs = append(errs, err)
			continue
		}
		deleted = append(deleted, id)
	}
	errs = append(errs, a.print(map[string]any{"deleted": deleted}, func(w io.Writer) {
		for _, id := range deleted {
			fmt.Fprintln(w, id)
		}
	}))
	return errors.Join(errs...)
}

func (a *app) hostCreateCommand() *cobra.Command {
	var r api.CreateHostRequest
	var kind string
	cmd := &cobra.Command{
		Use: "create", Short: "Make a host record and its registration token", Args: noArgs,
		Long: "Makes the record of a host and the one-time token, good for an hour, with which its agent registers. Regular hosts are made by admins, byoc hosts also by the owner of a team.",
		Example: `  wrenn host create
  wrenn host create --type byoc --provider hetzner --zone fsn1`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r.Type = api.HostType(kind)
			return a.asUser(cmd.Context(), func(c *wrenn.Client) error {
				h, err := c.CreateHost(cmd.Context(), r)
				if err != nil {
					return err
				}
				return a.printToken(h, c.URL())
			})
		},
	}
	cmd.Flags().StringVar(&kind, "type", string(api.HostTypeRegular), "regular or byoc")
	cmd.Flags().StringVar(&r.TeamID, "team", "", "`TEAM` of a byoc host (your own)")
	cmd.Flags().StringVar(&r.Provider, "provider", "", "where the machine is from")
	cmd.Flags().StringVar(&r.AvailabilityZone, "zone", "", "availability zone")
	return cmd
}

func (a *app) printToken(h *api.HostWithToken, url string) error {
	return a.print(h, func(w io.Writer) {
		fields(w, "host", h.Host.ID, "token", h.RegistrationToken)
		a.note("\nThe token works once, within an hour. On the host, with the address at which the control plane reaches it:\n\n"+
			"  sudo AGENT_CP_URL=%s wrenn-agent --register %s --address IP:50051\n", url, h.RegistrationToken)
	})
}

func (a *app) hostListCommand() *cobra.Command {
	var f wrenn.HostFilter
	var status, kind string
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List hosts", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.Status, f.Type = api.HostStatus(status), api.HostType(kind)
			return a.asUser(cmd.Context(), func(c *wrenn.Client) error {
				list := []api.Host{}
				for h, err := range c.Hosts(cmd.Context(), f) {
					if err != nil {
						return err
					}
					list = append(list, h)
				}
				return a.print(list, func(w io.Writer) { printHosts(w, list) })
			})
		},
	}
	cmd.Flags().StringVar(&status, "status", "", "pending, online or offline")
	cmd.Flags().StringVar(&kind, "type", "", "regular or byoc")
	cmd.Flags().StringVar(&f.Tag, "tag", "", "only those with this `TAG`")
	return cmd
}

func printHosts(w io.Writer, list []api.Host) {
	rows := make([][]string, len(list))
	for i, h := range list {
		rows[i] = []string{h.ID, string(h.Type), string(h.Status), h.Address, h.Arch, number(int64(h.CPUCores)), sizeOrNone(h.MemoryMB),
			driverOf(h), strconv.FormatInt(h.Sandboxes, 10), age(h.LastHeartbeatAt)}
	}
	table(w, []string{"ID", "TYPE", "STATUS", "ADDRESS", "ARCH", "CPUS", "MEMORY", "DRIVER", "SANDBOXES", "SEEN"}, rows)
}

func number(n int64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

func sizeOrNone(mb int64) string {
	if mb == 0 {
		return ""
	}
	return megabytes(mb)
}

func driverOf(h api.Host) string {
	if h.Acceleration == "" {
		return h.Driver
	}
	return h.Driver + " (" + h.Acceleration + ")"
}

func (a *app) hostGetCommand() *cobra.Command {
	return &cobra.Command{
		Use: "get HOST", Short: "Show a host", Args: exactArgs("a HOST"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.asUser(cmd.Context(), func(c *wrenn.Client) error {
				h, err := c.Host(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				tags, err := c.HostTags(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				out := struct {
					*api.Host
					Tags []string `json:"tags"`
				}{h, tags}
				return a.print(out, func(w io.Writer) { printHost(w, *h, tags) })
			})
		},
	}
}

func printHost(w io.Writer, h api.Host, tags []string) {
	versions := make([]string, 0, len(h.Versions))
	for _, name := range []string{"agent", "vmm", "kernel", "envd"} {
		if v := h.Versions[name]; v != "" {
			versions = append(versions, name+" "+v)
		}
	}
	fields(w, "id", h.ID, "type", string(h.Type), "team", h.TeamID, "status", string(h.Status), "address", h.Address,
		"provider", h.Provider, "zone", h.AvailabilityZone, "arch", h.Arch, "cpus", number(int64(h.CPUCores)), "cpu", h.CPUModel,
		"memory", sizeOrNone(h.MemoryMB), "memory free", sizeOrNone(h.FreeMemoryMB), "disk", sizeOrNone(h.DiskGB<<10), "disk free", sizeOrNone(h.FreeDiskMB),
		"driver", driverOf(h), "versions", strings.Join(versions, ", "), "certificate", yesNo(h.MtlsEnabled), "sandboxes", strconv.FormatInt(h.Sandboxes, 10),
		"tags", strings.Join(tags, " "), "last seen", moment(h.LastHeartbeatAt), "created", moment(h.CreatedAt))
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (a *app) hostTokenCommand() *cobra.Command {
	return &cobra.Command{
		Use: "token HOST", Short: "Make a new registration token for a host that is still pending", Args: exactArgs("a HOST"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.asUser(cmd.Context(), func(c *wrenn.Client) error {
				h, err := c.NewHostToken(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return a.printToken(h, c.URL())
			})
		},
	}
}

func (a *app) tagCommand() *cobra.Command {
	cmd := group("tag", "Manage a host's tags", "tags")
	change := func(use, short string, do func(*wrenn.Client, *cobra.Command, string, string) error) *cobra.Command {
		return &cobra.Command{Use: use + " HOST TAG…", Short: short, Args: atLeast("a HOST", "a TAG"),
			RunE: func(cmd *cobra.Command, args []string) error {
				return a.asUser(cmd.Context(), func(c *wrenn.Client) error {
					for _, tag := range args[1:] {
						if err := do(c, cmd, args[0], tag); err != nil {
							return err
						}
					}
					return a.printTags(cmd, c, args[0])
				})
			}}
	}
	cmd.AddCommand(
		change("add", "Add tags", func(c *wrenn.Client, cmd *cobra.Command, id, tag string) error {
			return c.AddHostTag(cmd.Context(), id, tag)
		}),
		change("rm", "Remove tags", func(c *wrenn.Client, cmd *cobra.Command, id, tag string) error {
			return c.RemoveHostTag(cmd.Context(), id, tag)
		}),
		&cobra.Command{Use: "ls HOST", Short: "List tags", Args: exactArgs("a HOST"),
			RunE: func(cmd *cobra.Command, args []string) error {
				return a.asUser(cmd.Context(), func(c *wrenn.Client) error { return a.printTags(cmd, c, args[0]) })
			}})
	return cmd
}

func (a *app) printTags(cmd *cobra.Command, c *wrenn.Client, id string) error {
	tags, err := c.HostTags(cmd.Context(), id)
	if err != nil {
		return err
	}
	return a.print(api.TagList{Tags: tags}, func(w io.Writer) {
		for _, t := range tags {
			fmt.Fprintln(w, t)
		}
	})
}

func (a *app) keyCommand() *cobra.Command {
	cmd := group("key", "Manage the team's API keys", "keys")
	cmd.AddCommand(
		&cobra.Command{
			Use: "create NAME", Short: "Make an API key and print it, once", Args: exactArgs("a NAME"),
			Example: "  export WRENN_API_KEY=$(wrenn key create ci)",
			RunE: func(cmd *cobra.Command, args []string) error {
				return a.asUser(cmd.Context(), func(c *wrenn.Client) error {
					k, err := c.CreateKey(cmd.Context(), args[0])
					if err != nil {
						return err
					}
					return a.print(k, func(w io.Writer) {
						fmt.Fprintln(w, k.Key)
						a.note("Keep it: it is not shown again. Its id is %s.", k.ID)
					})
				})
			},
		},
		&cobra.Command{
			Use: "ls", Aliases: []string{"list"}, Short: "List API keys", Args: noArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return a.asUser(cmd.Context(), func(c *wrenn.Client) error {
					list := []api.APIKey{}
					for k, err := range c.Keys(cmd.Context()) {
						if err != nil {
							return err
						}
						list = append(list, k)
					}
					return a.print(list, func(w io.Writer) {
						rows := make([][]string, len(list))
						for i, k := range list {
							rows[i] = []string{k.ID, k.Name, k.KeyPrefix + "…", age(k.CreatedAt), age(k.LastUsedAt)}
						}
						table(w, []string{"ID", "NAME", "KEY", "AGE", "USED"}, rows)
					})
				})
			},
		},
		&cobra.Command{
			Use: "rm KEY…", Short: "Revoke API keys, by id", Args: atLeast("a KEY"),
			RunE: func(cmd *cobra.Command, args []string) error {
				return a.asUser(cmd.Context(), func(c *wrenn.Client) error {
					return a.each(args, func(id string) error { return c.DeleteKey(cmd.Context(), id) })
				})
			},
		})
	return cmd
}
