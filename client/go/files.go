package resumed

import (
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const filesCheckInterval = time.Second

// files are read again when they change, at most once a second: once they look the same twice in a row, or were last written a
// second ago, so that no read gets half of a change. Files that cannot be used are reported once, and the content that was read
// before stays in use.
type files struct {
	paths  []string
	what   string // for the log
	logger *slog.Logger

	started   time.Time
	nextCheck atomic.Int64 // nanoseconds after started
	mu        sync.Mutex   // guards what follows
	seen      []fs.FileInfo
	taken     []fs.FileInfo
	takenAt   time.Time
	complaint string
}

// newFiles returns files with their present state; call it before the first read, so that a change in between is noticed.
func newFiles(what string, logger *slog.Logger, paths ...string) *files {
	now := time.Now()
	f := &files{paths: paths, what: what, logger: logger, started: now, takenAt: now}
	if f.logger == nil {
		f.logger = slog.Default()
	}
	f.nextCheck.Store(int64(filesCheckInterval))
	f.taken, _ = f.look()
	return f
}

// follow checks the files at most once a second, and calls read when they have changed and settled. It logs the result of read.
func (f *files) follow(read func() (slog.Attr, error)) {
	now, next := int64(time.Since(f.started)), f.nextCheck.Load()
	if now < next || !f.nextCheck.CompareAndSwap(next, now+int64(filesCheckInterval)) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var news slog.Attr
	seen, err := f.look()
	if err == nil {
		settled := slices.EqualFunc(seen, f.seen, sameVersion) || !slices.ContainsFunc(seen, isRecent)
		f.seen = seen
		switch {
		case slices.EqualFunc(seen, f.taken, sameVersion):
			f.complaint = ""
			return
		case !settled:
			return
		}
		news, err = read()
	}
	if err == nil {
		f.taken, f.takenAt, f.complaint = seen, time.Now(), ""
		f.logger.Info(f.what+" read again", news)
		return
	}
	if err.Error() != f.complaint { // once, not every second
		f.logger.Error(f.what+" not read again, what was read before stays", "error", err)
	}
	f.complaint = err.Error()
}

// lastReload returns whether the present content of the files is in use, and when content that is in use was last read.
func (f *files) lastReload() (successful bool, at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.complaint == "", f.takenAt
}

func (f *files) look() ([]fs.FileInfo, error) {
	var versions []fs.FileInfo
	for _, path := range f.paths {
		version, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("resumed: %s: %w", f.what, err)
		}
		versions = append(versions, version)
	}
	return versions, nil
}

func isRecent(file fs.FileInfo) bool { return time.Since(file.ModTime()) < filesCheckInterval }

func sameVersion(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}
