package estate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// Network carries connections to servers through listeners of its own, so that they can be cut between two parties: what is
// sent is held back, as if every packet were lost, and goes on when the cut is healed and both ends still wait for it.
// A new connection to the other side of a cut is taken and never answered. It tells who connects by asking Linux which
// process has the other end, and so needs no cooperation; a process that is no party is never cut off.
type Network struct {
	mu      sync.Mutex
	changed *sync.Cond
	closed  bool
	parties map[string]func() int
	cuts    map[[2]string]bool
	ends    []net.Listener
	open    map[net.Conn]bool
	wg      sync.WaitGroup
}

// NewNetwork returns one that carries nothing yet.
func NewNetwork() *Network {
	n := &Network{parties: map[string]func() int{}, cuts: map[[2]string]bool{}, open: map[net.Conn]bool{}}
	n.changed = sync.NewCond(&n.mu)
	return n
}

// Party makes the process that pid returns a party; 0: it does not run.
func (n *Network) Party(name string, pid func() int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.parties[name] = pid
}

// Expose returns the address under which others reach a server of the party called name.
func (n *Network) Expose(name, network, address string) (string, error) {
	at, err := FreeAddrs(1)
	if err != nil {
		return "", err
	}
	l, err := net.Listen("tcp", at[0])
	if err != nil {
		return "", err
	}
	n.mu.Lock()
	n.ends = append(n.ends, l)
	n.mu.Unlock()
	n.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // by Close
			}
			n.wg.Go(func() { n.carry(c, name, network, address) })
		}
	})
	return at[0], nil
}

// Cut separates a and b until Heal.
func (n *Network) Cut(a, b string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cuts[[2]string{a, b}], n.cuts[[2]string{b, a}] = true, true
}

// Heal joins a and b again.
func (n *Network) Heal(a, b string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.cuts, [2]string{a, b})
	delete(n.cuts, [2]string{b, a})
	n.changed.Broadcast()
}

// Close ends all connections.
func (n *Network) Close() {
	n.mu.Lock()
	n.closed = true
	for _, l := range n.ends {
		_ = l.Close() // it carries nothing more either way
	}
	for c := range n.open {
		_ = c.Close()
	}
	n.changed.Broadcast()
	n.mu.Unlock()
	n.wg.Wait()
}

// carry joins a connection with the server.
func (n *Network) carry(c net.Conn, to, network, address string) {
	if !n.keep(c) {
		return
	}
	defer n.drop(c)
	from := n.owner(c.RemoteAddr())
	if !n.pass(from, to) {
		return
	}
	var d net.Dialer
	s, err := d.DialContext(context.Background(), network, address)
	if err != nil {
		return // as if nobody listened there
	}
	if !n.keep(s) {
		return
	}
	defer n.drop(s)
	var both sync.WaitGroup
	both.Go(func() { n.copy(s, c, from, to) })
	both.Go(func() { n.copy(c, s, from, to) })
	both.Wait()
}

// copy carries one direction until either end closes; that, too, does not pass a cut.
func (n *Network) copy(dst, src net.Conn, a, b string) {
	buf := make([]byte, 32<<10)
	for {
		k, err := src.Read(buf)
		if !n.pass(a, b) {
			return
		}
		if k > 0 {
			if _, werr := dst.Write(buf[:k]); werr != nil {
				err = werr
			}
		}
		if err != nil {
			// Half-open connections are not used by anything here.
			_, _ = dst.Close(), src.Close()
			return
		}
	}
}

// pass waits while a and b are cut off from one another; false: the network is closed.
func (n *Network) pass(a, b string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for n.cuts[[2]string{a, b}] && !n.closed {
		n.changed.Wait()
	}
	return !n.closed
}

func (n *Network) keep(c net.Conn) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		_ = c.Close()
		return false
	}
	n.open[c] = true
	return true
}

func (n *Network) drop(c net.Conn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.open, c)
	_ = c.Close()
}

// owner is the party whose process has the socket at address, "" if none has.
func (n *Network) owner(address net.Addr) string {
	inode, err := inodeOf(address)
	if err != nil {
		return ""
	}
	n.mu.Lock()
	parties := map[string]int{}
	for name, pid := range n.parties {
		parties[name] = pid()
	}
	n.mu.Unlock()
	want := "socket:[" + inode + "]"
	for name, pid := range parties {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil || pid == 0 {
			continue
		}
		for _, fd := range fds {
			if link, err := os.Readlink(fd); err == nil && link == want {
				return name
			}
		}
	}
	return ""
}

// inodeOf finds the socket of this host that is bound to a loopback address.
func inodeOf(address net.Addr) (string, error) {
	tcp, ok := address.(*net.TCPAddr)
	if !ok {
		return "", fmt.Errorf("%s is not TCP", address)
	}
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return "", err
	}
	local := fmt.Sprintf("0100007F:%04X", tcp.Port)
	for line := range bytes.Lines(table) {
		if f := strings.Fields(string(line)); len(f) > 9 && f[1] == local {
			if _, err := strconv.ParseUint(f[9], 10, 64); err == nil {
				return f[9], nil
			}
		}
	}
	return "", errors.New("nobody has " + address.String())
}
