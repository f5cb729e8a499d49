//go:build unix

package resumed

import (
	"io/fs"
	"os"
	"syscall"
)

// foreign reports whether another user than this one and root owns a file, and so may change it.
func foreign(file fs.FileInfo) bool {
	status, ok := file.Sys().(*syscall.Stat_t)
	return ok && foreignTo(os.Geteuid(), int(status.Uid))
}

func foreignTo(user, owner int) bool { return user != owner && user != 0 && owner != 0 }
