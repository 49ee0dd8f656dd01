package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/guest"
	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/undo"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// templatesDir holds, below AGENT_SANDBOXES_PATH, one machine at rest per image, vCPUs and memory: booted
// once without any identity, frozen as soon as its guest agent answered. Every create clones one.
const templatesDir = "templates"

// templates makes and finds them.
type templates struct {
	mu      sync.Mutex
	pending map[string]*preparation
}

type preparation struct {
	progress progress
	done     chan struct{}
	err      error
}

// template gives the machine to clone for an image and a size, making it if it is not there yet; cold
// says that this call, or one it waited for, had to.
func (s *Sandboxes) template(ctx context.Context, img image, vcpus, memoryMB int) (m machine, cold bool, err error) {
	name := fmt.Sprintf("%s-%s-%dx%d", img.Name, img.Digest[:16], vcpus, memoryMB)
	m = machine(filepath.Join(s.dir, templatesDir, name))
	s.templates.mu.Lock()
	p := s.templates.pending[name]
	if p == nil {
		if man, err := m.load(); err == nil && man.fits(s.driver.Capabilities().Own()) == nil {
			s.templates.mu.Unlock()
			return m, false, nil
		}
		p = &preparation{done: make(chan struct{})}
		s.templates.pending[name] = p
		go s.prepare(withProgress(context.WithoutCancel(ctx), &p.progress), p, name, m, img, vcpus, memoryMB)
	}
	s.templates.mu.Unlock()
	defer progressOf(ctx).follow(&p.progress)()
	select {
	case <-p.done:
		return m, true, p.err
	case <-ctx.Done():
		return m, true, ctx.Err()
	}
}

func (s *Sandboxes) prepare(ctx context.Context, p *preparation, name string, m machine, img image, vcpus, memoryMB int) {
	ctx, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	began := time.Now()
	p.err = s.makeTemplate(ctx, m, img, vcpus, memoryMB)
	s.log.Info("prepared a template", "template", name, "took", time.Since(began).Round(time.Millisecond), "err", p.err)
	s.templates.mu.Lock()
	delete(s.templates.pending, name)
	s.templates.mu.Unlock()
	close(p.done)
}

// makeTemplate boots the image in a scratch directory, freezes it when its guest agent answers, and
// puts it in place whole and durable.
func (s *Sandboxes) makeTemplate(ctx context.Context, m machine, img image, vcpus, memoryMB int) (err error) {
	defer func() { err = diskFull(err) }()
	var u undo.Stack
	defer u.Run(&err)
	scratch := machine(m.dir() + ".new")
	if err := errors.Join(s.discard(scratch.dir()), s.discard(m.dir())); err != nil { // left by a crash, or unfit
		return err
	}
	if err := os.Mkdir(scratch.dir(), 0o711); err != nil {
		return err
	}
	u.Push(func() error { return s.discard(scratch.dir()) })
	step(ctx, stepImporting)
	if err := s.cloneImage(ctx, img, scratch); err != nil {
		return err
	}
	slot, err := s.acquireSlot(ctx)
	if err != nil {
		return err
	}
	defer s.net.Release(slot)
	cfg, err := s.vmConfig("template", scratch, filepath.Join(scratch.dir(), consoleLog), vcpus, memoryMB, slot)
	if err != nil {
		return err
	}
	step(ctx, stepBooting)
	handle, err := s.driver.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.driver.Destroy(context.WithoutCancel(ctx), handle)) }()
	if err := s.settle(ctx, slot); err != nil {
		return err
	}
	if err := s.driver.Pause(ctx, handle); err != nil {
		return err
	}
	if err := scratch.rest(ctx, s.driver, handle, vcpus, ""); err != nil {
		return err
	}
	step(ctx, stepDurable)
	if err := scratch.sync(); err != nil {
		return err
	}
	if err := os.Rename(scratch.dir(), m.dir()); err != nil {
		return err
	}
	return storage.Sync(filepath.Dir(m.dir()))
}

// settle waits until a guest that just booted is ready to be frozen.
func (s *Sandboxes) settle(ctx context.Context, slot *network.Slot) error {
	client := guest.New(network.GuestIP, slot.DialContext)
	defer client.Close()
	if err := rehearse(ctx, client); err != nil {
		return wrenn.Wrap(err, wrenn.KindAgentError, "the template's guest agent did not become ready; its console is kept by the host")
	}
	return nil
}

// cloneImage puts an image's disk into a machine that has none.
func (s *Sandboxes) cloneImage(ctx context.Context, img image, m machine) error {
	ctx, cancel := context.WithTimeout(ctx, importTimeout)
	defer cancel()
	src, err := s.images.open(ctx, img)
	if err != nil {
		return fmt.Errorf("import image %s: %w", img.Name, err)
	}
	return s.store.Clone(ctx, src, m.disk())
}
