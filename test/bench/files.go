package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/test/stack"
)

const (
	transferBytes = 64 << 20
	transferRuns  = 5
	transferPath  = "/home/user/transfer"
	tcpPort       = "9000"
)

// tcpServer runs in the guest. A connection begins with one letter: u for upload, until the client is
// done, answered by a letter; d for download of transferBytes.
const tcpServer = `
import socket, sys
size = int(sys.argv[1])
s = socket.create_server(("0.0.0.0", int(sys.argv[2])))
buf = bytearray(1 << 20)
while True:
    c, _ = s.accept()
    if c.recv(1) == b"u":
        n = 0
        while n < size:
            n += c.recv_into(buf)
        c.sendall(b"k")
    else:
        view = memoryview(buf)
        n = 0
        while n < size:
            n += c.send(view[:min(len(buf), size - n)])
    c.close()
`

// measureFiles times a file through REST, beside as many bytes by plain TCP to and from the same guest.
func measureFiles(ctx context.Context, b *bench) (err error) {
	const memoryMB = 512
	if err := b.prepare(ctx, "base", memoryMB); err != nil {
		return err
	}
	sb, err := b.create(ctx, "base", memoryMB)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.remove(ctx, sb)) }()
	guest, err := b.into(sb.ID)
	if err != nil {
		return err
	}
	defer guest.close()
	t := &transfer{sb: sb, guest: guest, data: make([]byte, transferBytes)}
	_, _ = rand.NewChaCha8([32]byte{}).Read(t.data) // never fails
	if err := t.serve(ctx); err != nil {
		return err
	}
	for _, way := range []struct {
		name        string
		ours, floor func(context.Context) error
	}{
		{"upload of 64 MiB through REST", t.upload, t.rawUpload},
		{"download of 64 MiB through REST", t.download, t.rawDownload},
	} {
		var ours, floor []float64
		for i := range transferRuns {
			if b.enough(i) {
				break
			}
			rate, err := perSecond(ctx, way.ours)
			if err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
			ours = append(ours, rate)
			if rate, err = perSecond(ctx, way.floor); err != nil {
				return fmt.Errorf("%s, raw: %w", way.name, err)
			}
			floor = append(floor, rate)
		}
		f := summarize(floor...)
		b.add(way.name, "MiB/s", summarize(ours...), &f, atLeastTimes(0.8))
	}
	return nil
}

// perSecond is the rate of a transfer in MiB/s.
func perSecond(ctx context.Context, fn func(context.Context) error) (float64, error) {
	took, err := timed(func() error { return fn(ctx) })
	return transferBytes / float64(1<<20) / (took / 1000), err
}

type transfer struct {
	sb    *wrenn.Sandbox
	guest *direct
	data  []byte
}

// serve starts the TCP server in the guest and returns when it listens.
func (t *transfer) serve(ctx context.Context) error {
	args := []string{"-c", tcpServer, fmt.Sprint(transferBytes), tcpPort}
	if _, err := t.sb.Background(ctx, wrenn.ExecOptions{Cmd: "python3", Args: args}); err != nil {
		return err
	}
	return stack.Eventually(ctx, 20*time.Second, func() error { return t.rawDownload(ctx) })
}

func (t *transfer) upload(ctx context.Context) error {
	info, err := t.sb.Files().Write(ctx, transferPath, bytes.NewReader(t.data))
	if err == nil && info.Size != transferBytes {
		err = fmt.Errorf("the file has %d bytes", info.Size)
	}
	return err
}

func (t *transfer) download(ctx context.Context) error {
	r, err := t.sb.Files().Open(ctx, transferPath)
	if err != nil {
		return err
	}
	defer r.Close()
	return wantAll(io.Copy(io.Discard, r))
}

func wantAll(n int64, err error) error {
	if err == nil && n != transferBytes {
		err = fmt.Errorf("only %d bytes came", n)
	}
	return err
}

func (t *transfer) rawUpload(ctx context.Context) error {
	return t.raw(ctx, "u", func(conn net.Conn) error {
		if _, err := conn.Write(t.data); err != nil {
			return err
		}
		_, err := io.ReadFull(conn, make([]byte, 1))
		return err
	})
}

func (t *transfer) rawDownload(ctx context.Context) error {
	return t.raw(ctx, "d", func(conn net.Conn) error { return wantAll(io.Copy(io.Discard, conn)) })
}

func (t *transfer) raw(ctx context.Context, letter string, fn func(net.Conn) error) error {
	host, _, err := net.SplitHostPort(t.guest.client.Host())
	if err != nil {
		return err
	}
	conn, err := t.guest.slot.DialContext(ctx, "tcp", net.JoinHostPort(host, tcpPort))
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := io.WriteString(conn, letter); err != nil {
		return err
	}
	return fn(conn)
}
