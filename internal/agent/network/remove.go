package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/vishvananda/netlink"

	"github.com/wrenn-sandbox/wrenn/internal/agent/netns"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Sweep removes what is left over of this Name: namespaces and links that are neither warm nor acquired,
// and the host's rules if there is no egress. The agent calls it when it has adopted what still runs.
func (p *Pool) Sweep(ctx context.Context) error {
	p.mu.Lock()
	keep := map[int]bool{}
	var leftovers []*Slot
	for i, u := range p.uses {
		if u == found {
			p.uses[i] = leaving
			leftovers = append(leftovers, &Slot{Index: i, NetnsPath: netnsPath(p.opts.Name, i)})
			continue
		}
		keep[i] = true
	}
	p.mu.Unlock()
	for _, s := range leftovers {
		p.opts.Log.Info("removing a leftover network slot", "slot", s.Index)
		p.drop(s)
	}
	errs := []error{removeLinks(p.opts, keep)}
	if p.opts.Egress == EgressNone {
		errs = append(errs, removeHostRules(ctx, p.opts))
	}
	p.wakeFill()
	if err := errors.Join(errs...); err != nil {
		return wrenn.Wrap(err, wrenn.KindInternal, "cannot remove leftover networks")
	}
	return nil
}

// removeLinks removes the host's ends of pairs whose slot is not kept.
func removeLinks(opts Options, keep map[int]bool) error {
	var names []string
	err := netns.Do(opts.hostNetns, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if i, ok := indexOf(l.Attrs().Name, linkPrefix(opts.Name)); ok && !keep[i] {
				names = append(names, l.Attrs().Name)
			}
		}
		return err
	})
	errs := []error{err}
	for _, name := range names {
		errs = append(errs, removeLink(opts.hostNetns, name))
	}
	return errors.Join(errs...)
}

func removeHostRules(ctx context.Context, opts Options) error {
	rules := fmt.Sprintf("table inet %s\ndelete table inet %s\n", hostTable(opts.Name), hostTable(opts.Name))
	if err := netns.Do(opts.hostNetns, func() error { return applyRules(ctx, rules) }); err != nil {
		return err
	}
	if err := os.Remove(rangeFile + opts.Name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Remove removes every object of an instance from the host; for a reset, when no VM runs any more.
func Remove(ctx context.Context, name string) error {
	opts, err := Options{Name: name, Slots: 1}.normal()
	if err != nil {
		return err
	}
	return removeAll(ctx, opts)
}

func removeAll(ctx context.Context, opts Options) error {
	indexes, err := onHost(opts.Name)
	errs := []error{err}
	for _, i := range indexes {
		errs = append(errs, removeNetns(netnsPath(opts.Name, i)))
	}
	errs = append(errs, removeLinks(opts, nil), removeHostRules(ctx, opts))
	if err := errors.Join(errs...); err != nil {
		return wrenn.Wrap(err, wrenn.KindInternal, "cannot remove the networks of %q", opts.Name)
	}
	return nil
}
