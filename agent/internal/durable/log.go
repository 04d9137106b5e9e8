package durable

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/certmesh/certmesh/protocol/fault"
)

// Log is a Store that keeps its blobs in one file, to which changes are appended, for what changes often: what is written
// while the disk is busy with the former batch becomes durable with one fsync, without a timer. Replacing a file of its own
// takes two, and the commits of its file system's journal that come with them.
//
// Space is laid out ahead, in zeros, so that an append changes no metadata and needs no free space. When it is used up
// everything that counts goes into a new file, which takes the old one's name. A record has a checksum: of what a power cut
// tore, nobody was told that it is stored. A record that is damaged later costs its blob only, and the file is set aside.
//
// It is safe for concurrent use, and runs no goroutine while nothing is written.
type Log struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex
	live  map[string][]byte // as on disk
	queue []pending
	busy  bool

	// The file, of whoever is busy; nil: the next batch makes one.
	file *os.File
	size int64 // laid out
	// least is what is laid out at least.
	least int64
	end   int64 // of the records
}

// pending is a change that waits, a probe of the disk, or (pass) nothing but a place in the order.
type pending struct {
	name                string
	data                []byte
	remove, probe, pass bool
	done                func(error)
}

const (
	logName  = "log"
	logLeast = 1 << 20
	// logTight is what is laid out beyond what is needed where there is no room for logLeast.
	logTight = 16 << 10
	// maxBatch bounds what one fsync is waited for.
	maxBatch = 256
	// maxBlob bounds a record.
	maxBlob = 16 << 20
)

// OpenLog makes dir if needed and reads what is in it.
func OpenLog(dir string, log *slog.Logger) (*Log, error) {
	if err := PrivateDir(dir); err != nil {
		return nil, err
	}
	if err := Sweep(dir); err != nil {
		return nil, err
	}
	c, err := readLog(dir)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, logName)
	if c.damaged > 0 {
		log.Error("records are damaged and left out; the file is set aside", "path", path, "records", c.damaged)
		_ = os.Remove(path + ".damaged")
		if err := os.Link(path, path+".damaged"); err != nil {
			log.Error("the damaged file cannot be set aside", "path", path, "err", err)
		}
	}
	l := &Log{dir: dir, log: log, live: c.live, least: logLeast}
	if c.clean {
		// Without it the first batch makes a new file.
		if l.file, err = os.OpenFile(path, os.O_RDWR, 0); err == nil {
			l.size, l.end = c.size, c.end
		}
	}
	return l, nil
}

// ReadLog returns the blobs in dir for looking only, beside an agent that may be running.
func ReadLog(dir string) (map[string][]byte, error) {
	c, err := readLog(dir)
	return c.live, err
}

// content is what a log file holds.
type content struct {
	live      map[string][]byte
	size, end int64
	// damaged records are followed by good ones; clean: nothing but zeros follows the last record, and none is damaged.
	damaged int
	clean   bool
}

func readLog(dir string) (content, error) {
	path := filepath.Join(dir, logName)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return content{live: map[string][]byte{}}, nil
	}
	if err != nil {
		return content{}, fault.Wrap(fault.Retryable, err, "%s cannot be read (%s)", path, Reason(err))
	}
	return parseLog(data), nil
}

// A record is its magic, the length and the CRC-32C of its body, and the body: 'w' or 'r', the length of the name in two
// bytes, the name and the blob.
const (
	magic      = "\xc5log"
	recordHead = len(magic) + 8
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func appendRecord(b []byte, name string, data []byte, remove bool) []byte {
	op := byte('w')
	if remove {
		op, data = 'r', nil
	}
	at := len(b)
	b = append(b, magic...)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0, op)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(name))) //nolint:gosec // set refuses longer names
	b = append(b, name...)
	b = append(b, data...)
	body := b[at+recordHead:]
	binary.LittleEndian.PutUint32(b[at+4:], uint32(len(body))) //nolint:gosec // set refuses longer blobs
	binary.LittleEndian.PutUint32(b[at+8:], crc32.Checksum(body, castagnoli))
	return b
}

// parseLog reads records up to the zeros. What is torn at the end is none: it was never stored.
func parseLog(data []byte) content {
	c := content{live: map[string][]byte{}, size: int64(len(data))}
	bad := false
	at := 0
	for used := len(bytes.TrimRight(data, "\x00")); at < used; {
		name, blob, remove, n := parseRecord(data[at:])
		if n == 0 {
			// The next record begins at its magic; in a blob it has no checksum that fits.
			bad = true
			next := bytes.Index(data[at+1:], []byte(magic))
			if next < 0 {
				break
			}
			at += 1 + next
			continue
		}
		if bad {
			bad = false
			c.damaged++
		}
		if remove {
			delete(c.live, name)
		} else {
			c.live[name] = blob
		}
		at += n
	}
	c.end, c.clean = int64(at), !bad && c.damaged == 0 && c.size > 0
	return c
}

// parseRecord reads the record at the beginning of data; n is its length, 0 if there is none.
func parseRecord(data []byte) (name string, blob []byte, remove bool, n int) {
	if len(data) < recordHead || string(data[:len(magic)]) != magic {
		return "", nil, false, 0
	}
	size := int(binary.LittleEndian.Uint32(data[4:]))
	if size < 3 || size > len(data)-recordHead {
		return "", nil, false, 0
	}
	body := data[recordHead : recordHead+size]
	nameLen := int(binary.LittleEndian.Uint16(body[1:]))
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(data[8:]) || 3+nameLen > size || body[0] != 'w' && body[0] != 'r' {
		return "", nil, false, 0
	}
	return string(body[3 : 3+nameLen]), bytes.Clone(body[3+nameLen:]), body[0] == 'r', recordHead + size
}

// Begin replaces the blob name and returns at once. done is called, not from within Begin, when it is on disk or the disk
// has refused it; blobs come onto the disk in the order of the calls. data must not be changed afterwards.
func (l *Log) Begin(name string, data []byte, done func(error)) {
	l.enqueue(pending{name: name, data: data, done: done})
}

// Forget removes the blob name after everything that was begun before, and returns at once. It is not synced: what nobody
// needs may come back after a power cut. done as with Begin; it may be nil.
func (l *Log) Forget(name string, done func(error)) {
	l.enqueue(pending{name: name, remove: true, done: done})
}

// Write implements Store.
func (l *Log) Write(name string, data []byte) error {
	return wait(func(done func(error)) { l.Begin(name, bytes.Clone(data), done) })
}

// Remove implements Store.
func (l *Log) Remove(name string) error {
	return wait(func(done func(error)) { l.Forget(name, done) })
}

// Probe says whether the disk would take a blob now, by writing a new file.
func (l *Log) Probe() error {
	return wait(func(done func(error)) { l.enqueue(pending{probe: true, done: done}) })
}

func wait(begin func(done func(error))) error {
	c := make(chan error, 1)
	begin(func(err error) { c <- err })
	return <-c
}

// Read implements Store.
func (l *Log) Read(name string) ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, ok := l.live[name]
	if !ok {
		return nil, &fs.PathError{Op: "read", Path: name, Err: fs.ErrNotExist}
	}
	return bytes.Clone(b), nil
}

// List implements Store.
func (l *Log) List(prefix string) ([]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Sorted(maps.Keys(l.live)), func(n string) bool { return !strings.HasPrefix(n, prefix) }), nil
}

func (l *Log) enqueue(p pending) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(l.queue, p)
	if !l.busy {
		l.busy = true
		go l.drain()
	}
}

// drain writes one batch after another until nothing waits.
func (l *Log) drain() {
	for {
		l.mu.Lock()
		n := min(len(l.queue), maxBatch)
		batch := l.queue[:n:n]
		if l.queue = l.queue[n:]; len(l.queue) == 0 {
			l.queue = nil
		}
		if n == 0 {
			l.busy = false
			l.mu.Unlock()
			return
		}
		l.mu.Unlock()
		for i, err := range l.commit(batch) {
			if batch[i].done != nil {
				batch[i].done(err)
			} else if err != nil {
				l.log.Warn("blob not removed", "name", batch[i].name, "err", err)
			}
		}
	}
}

// commit makes a batch durable.
func (l *Log) commit(batch []pending) []error {
	errs := make([]error, len(batch))
	var records []byte
	next := map[string][]byte{} // nil: removed
	sync, probe := false, false
	for i, p := range batch {
		switch {
		case p.pass:
		case p.probe:
			probe = true
		case len(p.name) > math.MaxUint16 || len(p.data) > maxBlob:
			errs[i] = fault.New(fault.Internal, "a blob of %d bytes cannot be stored", len(p.data))
		case p.remove:
			next[p.name] = nil
			records = appendRecord(records, p.name, nil, true)
		default:
			sync = true
			if next[p.name] = p.data; p.data == nil {
				next[p.name] = []byte{}
			}
			records = appendRecord(records, p.name, p.data, false)
		}
	}
	if len(records) == 0 && !probe {
		return errs
	}
	var err error
	if probe || l.file == nil || l.end+int64(len(records)) > l.size || gone(l.file) {
		err = l.renew(next, int64(len(records)))
	} else {
		err = l.append(records, sync)
	}
	if err != nil {
		err = fault.Wrap(fault.Retryable, err, "%s cannot be written (%s); free space or correct its permissions", filepath.Join(l.dir, logName), Reason(err))
		for i := range errs {
			if errs[i] == nil {
				errs[i] = err
			}
		}
		return errs
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, data := range next {
		if data == nil {
			delete(l.live, name)
		} else {
			l.live[name] = data
		}
	}
	return errs
}

// append writes records behind the others. After a failure nobody knows what the file holds: the next batch makes a new one.
func (l *Log) append(records []byte, sync bool) error {
	_, err := l.file.WriteAt(records, l.end)
	if err == nil && sync {
		err = fdatasync(l.file)
	}
	if err != nil {
		l.drop()
		return err
	}
	l.end += int64(len(records))
	return nil
}

// gone reports whether somebody removed the file: what is written to it would be lost.
func gone(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) != nil || st.Nlink == 0
}

func (l *Log) drop() {
	if l.file != nil {
		_ = l.file.Close() // nothing of it is needed
		l.file = nil
	}
}

// renew writes everything that counts, with the changes next, into a new file in place of the old one.
func (l *Log) renew(next map[string][]byte, room int64) (err error) {
	var all []byte
	for _, name := range slices.Sorted(maps.Keys(l.live)) { // nobody else writes to it
		if _, changed := next[name]; !changed {
			all = appendRecord(all, name, l.live[name], false)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(next)) {
		if next[name] != nil {
			all = appendRecord(all, name, next[name], false)
		}
	}
	end := int64(len(all))
	// As much again as there is, so that the cost of a new file stays in proportion.
	size := max(l.least, 2*end+room)
	f, err := os.CreateTemp(l.dir, tempPrefix+"*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	err = layOut(f, all, size)
	if tight := 2*end + room + logTight; tight < size && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)) {
		// A small disk: what is needed now, and a little.
		size = tight
		err = layOut(f, all, size)
	}
	if err != nil {
		return err
	}
	// From here on the old file is not to be written to: whether the name has moved is not known if this fails.
	l.drop()
	if err := os.Rename(f.Name(), filepath.Join(l.dir, logName)); err != nil {
		return err
	}
	if err := SyncDir(l.dir); err != nil {
		return err
	}
	l.file, l.size, l.end = f, size, end
	return nil
}

// layOut writes records and zeros up to size, from the beginning of a file, to the disk.
func layOut(f *os.File, records []byte, size int64) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	if _, err := f.WriteAt(append(slices.Clip(records), make([]byte, size-int64(len(records)))...), 0); err != nil {
		return err
	}
	return f.Sync()
}

// Close gives the file back after everything that was begun; nothing may be begun meanwhile. A later write makes a new one.
func (l *Log) Close() error {
	if err := wait(func(done func(error)) { l.enqueue(pending{pass: true, done: done}) }); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop()
	return nil
}
