package network

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/wrenn-sandbox/wrenn/internal/agent/netns"
)

// Bounds of a slot's forwarder. A guest that asks faster finds its questions dropped, and asks again.
const (
	dnsPort       = "53"
	dnsQueries    = 32   // at a time
	dnsConns      = 8    // TCP connections at a time
	dnsPerConn    = 64   // questions on one of them
	dnsQuerySize  = 4096 // bytes of a question
	dnsUDPAnswer  = 4096
	dnsTimeout    = 3 * time.Second // of one resolver
	dnsIdle       = 10 * time.Second
	dnsHeaderSize = 12
)

// forwarder answers DNS on a slot's gateway address by asking the host's resolvers (RFC 1035, 7766). It
// looks at headers and questions only, keeps nothing, and sends nothing that was not asked.
type forwarder struct {
	udp       *net.UDPConn
	tcp       *net.TCPListener
	resolvers func() []string // host:port of the host's resolvers
	log       *slog.Logger
	queries   chan struct{}
	conns     chan struct{}
	ctx       context.Context
	cancel    context.CancelFunc
	work      sync.WaitGroup
}

// serveNames starts a slot's forwarder, if the slot has egress.
func (p *Pool) serveNames(s *Slot) error {
	if p.opts.Egress != EgressInternet {
		return nil
	}
	f, err := newForwarder(s.NetnsPath, net.JoinHostPort(GatewayIP, dnsPort), p.opts.resolvers, p.opts.Log)
	if err != nil {
		return fmt.Errorf("name server of slot %d: %w", s.Index, err)
	}
	s.dns = f
	return nil
}

func newForwarder(netnsPath, addr string, resolvers func() []string, log *slog.Logger) (*forwarder, error) {
	f := &forwarder{
		resolvers: resolvers, log: log,
		queries: make(chan struct{}, dnsQueries), conns: make(chan struct{}, dnsConns),
	}
	err := netns.Do(netnsPath, func() error {
		udp, err := net.ResolveUDPAddr("udp4", addr)
		if err != nil {
			return err
		}
		if f.udp, err = net.ListenUDP("udp4", udp); err != nil {
			return err
		}
		// The same port as UDP got, where addr leaves it open.
		f.tcp, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: udp.IP, Port: f.udp.LocalAddr().(*net.UDPAddr).Port})
		if err != nil {
			f.udp.Close()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.work.Go(f.serveUDP)
	f.work.Go(f.serveTCP)
	return f, nil
}

func (f *forwarder) close() {
	f.cancel()
	f.udp.Close()
	f.tcp.Close()
	f.work.Wait()
}

func (f *forwarder) serveUDP() {
	buf := make([]byte, dnsQuerySize)
	for {
		n, from, err := f.udp.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // such as an ICMP error for an earlier answer
		}
		query := append([]byte(nil), buf[:n]...)
		if !valid(query) {
			continue
		}
		select {
		case f.queries <- struct{}{}:
		default:
			continue
		}
		f.work.Go(func() {
			defer func() { <-f.queries }()
			if _, err := f.udp.WriteToUDPAddrPort(f.answer(query, "udp"), from); err != nil && !errors.Is(err, net.ErrClosed) {
				f.log.Debug("cannot answer a DNS question", "err", err)
			}
		})
	}
}

func (f *forwarder) serveTCP() {
	for {
		conn, err := f.tcp.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		select {
		case f.conns <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		f.work.Go(func() {
			defer func() { <-f.conns }()
			f.serveConn(conn)
		})
	}
}

func (f *forwarder) serveConn(conn net.Conn) {
	defer conn.Close()
	defer context.AfterFunc(f.ctx, func() { conn.Close() })()
	for range dnsPerConn {
		_ = conn.SetDeadline(time.Now().Add(dnsIdle))
		query, err := readFramed(conn, dnsQuerySize)
		if err != nil || !valid(query) {
			return
		}
		if writeFramed(conn, f.answer(query, "tcp")) != nil {
			return
		}
	}
}

// valid tells whether a message is one ordinary question.
func valid(query []byte) bool {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil || h.Response || h.OpCode != 0 {
		return false
	}
	questions, err := p.AllQuestions()
	return err == nil && len(questions) == 1
}

// answer asks one resolver after the other; if none answers, the guest is told so (SERVFAIL).
func (f *forwarder) answer(query []byte, network string) []byte {
	for _, resolver := range f.resolvers() {
		answer, err := ask(f.ctx, network, resolver, query)
		if err == nil {
			return answer
		}
		if f.ctx.Err() != nil {
			break
		}
		f.log.Debug("a resolver did not answer", "resolver", resolver, "err", err)
	}
	return failure(query)
}

// failure is the query with the header bits of an answer that says SERVFAIL, and nothing else.
func failure(query []byte) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil {
		return nil
	}
	q, err := p.Question()
	if err != nil {
		return nil
	}
	m := dnsmessage.Message{
		Header: dnsmessage.Header{
			ID: h.ID, Response: true, RecursionDesired: h.RecursionDesired, RecursionAvailable: true,
			RCode: dnsmessage.RCodeServerFailure,
		},
		Questions: []dnsmessage.Question{q},
	}
	b, err := m.Pack()
	if err != nil {
		return nil
	}
	return b
}

// ask sends the query to a resolver under an id of its own, from a port of its own, and returns the answer
// under the guest's id.
func ask(ctx context.Context, network, resolver string, query []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, dnsTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, resolver)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	var id [2]byte
	_, _ = rand.Read(id[:])
	asked := append(append([]byte(nil), id[:]...), query[2:]...)
	if network == "udp" {
		if _, err := conn.Write(asked); err != nil {
			return nil, err
		}
	} else if err := writeFramed(conn, asked); err != nil {
		return nil, err
	}
	for {
		answer, err := readAnswer(conn, network)
		if err != nil {
			return nil, err
		}
		if len(answer) >= dnsHeaderSize && answer[0] == id[0] && answer[1] == id[1] && answer[2]&0x80 != 0 {
			copy(answer, query[:2])
			return answer, nil
		}
	}
}

func readAnswer(conn net.Conn, network string) ([]byte, error) {
	if network != "udp" {
		return readFramed(conn, 1<<16)
	}
	buf := make([]byte, dnsUDPAnswer)
	n, err := conn.Read(buf)
	return buf[:n], err
}

// readFramed reads a message with its two-byte length (RFC 1035, 4.2.2).
func readFramed(r io.Reader, limit int) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(length[:]))
	if n > limit {
		return nil, fmt.Errorf("DNS message of %d bytes", n)
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}

func writeFramed(w io.Writer, b []byte) error {
	if len(b) > 1<<16-1 {
		return errors.New("DNS message is too long")
	}
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
	return err
}
