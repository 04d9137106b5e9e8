package estate

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
)

// Ports are taken from below the range from which the system gives ports to outgoing connections: one that is free now
// must still be free when a server is started on it, and when a killed one is started again. Processes that run at the
// same time take theirs from different blocks.
const (
	firstPort  = 12288
	blockPorts = 256
	blocks     = 80 // up to 32767
)

// ports is this process's block.
var ports struct {
	sync.Mutex
	claim net.Listener // shows other processes that the block is taken; ends with this process
	first int
	next  int
}

// claimBlock takes a block that no other process has.
func claimBlock() error {
	start := rand.IntN(blocks)
	for i := range blocks {
		n := (start + i) % blocks
		l, err := net.Listen("unix", fmt.Sprintf("@certmesh-estate-ports-%d", n))
		if err == nil {
			ports.claim, ports.first = l, firstPort+n*blockPorts
			return nil
		}
	}
	return errors.New("other programs that run estates have taken all ports")
}

// FreeAddrs returns n distinct loopback addresses that nobody listens on.
func FreeAddrs(n int) ([]string, error) {
	ports.Lock()
	defer ports.Unlock()
	if ports.claim == nil {
		if err := claimBlock(); err != nil {
			return nil, err
		}
	}
	var out []string
	for range blockPorts {
		if len(out) == n {
			return out, nil
		}
		addr := fmt.Sprintf("127.0.0.1:%d", ports.first+ports.next)
		ports.next = (ports.next + 1) % blockPorts
		l, err := net.Listen("tcp", addr)
		if err != nil {
			continue // taken by something else
		}
		if err := l.Close(); err != nil {
			return nil, err
		}
		out = append(out, addr)
	}
	if len(out) == n {
		return out, nil
	}
	return nil, fmt.Errorf("of %d ports, %d are free where %d are wanted", blockPorts, len(out), n)
}
