package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	clusterlog "github.com/certmesh/certmesh/cluster/internal/log"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Recover sets a node's Raft directory aside, so that the node starts as one without a cluster: for a node whose Raft files
// are damaged, or for all nodes when a majority is lost for good. It returns where the files are now; deleting them loses
// nothing. The node must not run.
func Recover(dir string) (aside string, err error) {
	dir = filepath.Clean(dir)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return "", fault.New(fault.NotFound, "there are no Raft files in %s: nothing is to be recovered, start the node", dir)
	} else if err != nil {
		return "", fmt.Errorf("look at the Raft files: %w", err)
	}
	if clusterlog.InUse(dir) {
		return "", fault.New(fault.Rejected, "the Raft files in %s are in use: stop the node first", dir)
	}
	for i := 1; i < 1000; i++ {
		aside = fmt.Sprintf("%s.aside-%d", dir, i)
		if _, err := os.Lstat(aside); err == nil {
			continue
		} else if !errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("look for a free name: %w", err)
		}
		if err := os.Rename(dir, aside); err != nil {
			return "", fmt.Errorf("set the Raft files aside: %w", err)
		}
		return aside, nil
	}
	return "", fault.New(fault.Exhausted, "%s.aside-1 to -999 exist: delete the old ones", dir)
}
