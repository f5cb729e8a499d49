package resumed

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func keyLine(fill byte) string {
	return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{fill}, keySize)) + "\n"
}

func writeKeyring(t *testing.T, path, text string) {
	t.Helper()
	check(t, os.WriteFile(path+".new", []byte(text), 0o600))
	check(t, os.Rename(path+".new", path))
}

// settle has files looked at twice.
func settle(files *files, look func()) {
	for range 2 {
		files.nextCheck.Store(0)
		look()
	}
}

// A keyring file that cannot be used is refused in one line that says what to do and shows no key.
func TestUnusableKeyringFiles(t *testing.T) {
	almost := keyLine('k')[1:]
	for name, file := range map[string]struct {
		text string
		mode os.FileMode
		want string
	}{
		"readable by others": {keyLine(1), 0o644, "chmod 600"},
		"writable by group":  {keyLine(1), 0o660, "chmod 600"},
		"empty":              {"# nothing\n\n", 0o600, "holds no key"},
		"not a key":          {keyLine(1) + almost, 0o600, "line 2: not a key"},
		"short key":          {"AAAA\n", 0o600, "line 1: not a key"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "fleet.keys")
			check(t, os.WriteFile(path, []byte(file.text), 0o600))
			check(t, os.Chmod(path, file.mode))
			_, err := LoadKeyring(path, quiet)
			if err == nil || !strings.Contains(err.Error(), file.want) {
				t.Fatalf("%v, want %q", err, file.want)
			}
			if strings.Contains(err.Error(), strings.TrimSpace(almost)) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("shows too much: %v", err)
			}
		})
	}
	if _, err := LoadKeyring(filepath.Join(t.TempDir(), "none"), quiet); err == nil || !strings.Contains(err.Error(), "resumed keygen") {
		t.Fatalf("a missing file: %v", err)
	}
}

// A keyring file is its user's or root's.
func TestKeyringOfAnotherUser(t *testing.T) {
	for _, test := range []struct {
		user, owner int
		foreign     bool
	}{{1000, 1000, false}, {1000, 0, false}, {0, 1000, false}, {1000, 1001, true}} {
		if foreignTo(test.user, test.owner) != test.foreign {
			t.Errorf("%+v", test)
		}
	}
	path := filepath.Join(t.TempDir(), "fleet.keys")
	writeKeyring(t, path, keyLine(1))
	own, err := os.Stat(path)
	check(t, err)
	if foreign(own) {
		t.Fatal("the user's own file is foreign")
	}
}

// A changed file is read again, one that cannot be used is reported once, and the keys read before stay.
func TestKeyringIsReadAgain(t *testing.T) {
	var log bytes.Buffer
	path := filepath.Join(t.TempDir(), "fleet.keys")
	writeKeyring(t, path, "# first\n"+keyLine(1))
	keyring, err := LoadKeyring(path, slog.New(slog.NewTextHandler(&log, nil)))
	check(t, err)
	shows := func() string {
		settle(keyring.files, func() { _ = keyring.String() })
		return keyring.String()
	}
	before := shows()
	writeKeyring(t, path, keyLine(2)+keyLine(1))
	after := shows()
	if after == before || !strings.Contains(after, before[len("Keyring("):len(before)-1]) {
		t.Fatalf("%s became %s", before, after)
	}
	writeKeyring(t, path, "nonsense\n")
	for range 2 {
		if shows() != after {
			t.Fatal("the keys read before did not stay")
		}
	}
	if strings.Count(log.String(), "keyring not read again") != 1 {
		t.Fatalf("not reported once:\n%s", &log)
	}
}

// A file in the midst of a change is not read: it must look the same twice.
func TestKeyringInTheMiddleOfAChange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fleet.keys")
	writeKeyring(t, path, keyLine(1))
	keyring, err := LoadKeyring(path, quiet)
	check(t, err)
	before := keyring.String()
	look := func() string {
		keyring.files.nextCheck.Store(0)
		return keyring.String()
	}
	write := func(text string) {
		writeKeyring(t, path, text)
		check(t, os.Chtimes(path, time.Time{}, time.Now().Add(time.Hour))) // written just now, however slow the machine is
	}
	write(keyLine(2)) // the second line is not written yet
	if shown := look(); shown != before {
		t.Fatal("the middle of a change was read: ", shown)
	}
	write(keyLine(2) + keyLine(1))
	if shown := look(); shown != before {
		t.Fatal("the middle of a change was read: ", shown)
	}
	if shown := look(); !strings.Contains(shown, ", ") {
		t.Fatal("what has settled was not read: ", shown)
	}
	writeKeyring(t, path, keyLine(3))
	check(t, os.Chtimes(path, time.Time{}, time.Now().Add(-time.Minute))) // found by the first look in a while
	if shown := look(); strings.Contains(shown, ", ") {
		t.Fatal("what has settled long ago was not read: ", shown)
	}
}

// Nothing that prints a keyring, or what holds one, prints a key.
func TestNoKeyIsShown(t *testing.T) {
	secret := bytes.Repeat([]byte{0xa5}, keySize)
	keyring, err := NewKeyring(secret)
	check(t, err)
	sessions := wrap(t, newServer(), newFakeStore(), Options{Keyring: keyring})
	var shown bytes.Buffer
	for _, value := range []any{keyring, Options{Keyring: keyring}, &Options{Keyring: keyring}, sessions.options} {
		_, _ = fmt.Fprintf(&shown, "%v %+v %#v %s\n", value, value, value, value)
		slog.New(slog.NewTextHandler(&shown, nil)).Info("test", "value", value)
		slog.New(slog.NewJSONHandler(&shown, nil)).Info("test", "value", value)
	}
	for _, form := range []string{hex.EncodeToString(secret), base64.StdEncoding.EncodeToString(secret), "165 165", "0xa5, 0xa5"} {
		if strings.Contains(shown.String(), form) {
			t.Fatalf("a key is shown:\n%s", &shown)
		}
	}
}
