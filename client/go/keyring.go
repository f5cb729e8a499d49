package resumed

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
)

// A Keyring holds the fleet's keys: the first one seals sessions and issues ids, every one opens. It is safe for
// concurrent use, and shows the ids of its keys when printed, never the keys.
type Keyring struct {
	keys  atomic.Pointer[[]*fleetKey]
	files *files // nil: not from a file
}

// LoadKeyring reads a keyring file, as `resumed keygen` makes them: one key a line (base64 of 32 bytes), the first one
// seals, # begins a comment. The file must not be readable by others than its owner and group, and
// owned by this user or root.
//
// It is read again when it has changed and settled for a second, so that keys can be rotated while serving. A changed
// file that cannot be used is reported to logger (nil means slog.Default()), and the keys read before stay.
func LoadKeyring(path string, logger *slog.Logger) (*Keyring, error) {
	keyring := &Keyring{files: newFiles("keyring", logger, path)}
	if _, err := keyring.read(); err != nil {
		return nil, err
	}
	return keyring, nil
}

// NewKeyring returns a keyring of raw keys of 32 bytes, for programs whose secrets are not in files.
func NewKeyring(secrets ...[]byte) (*Keyring, error) {
	var keys []*fleetKey
	for _, secret := range secrets {
		if len(secret) != keySize {
			return nil, fmt.Errorf("resumed: each key of a keyring has %d bytes, not %d", keySize, len(secret))
		}
		keys = append(keys, newFleetKey(bytes.Clone(secret)))
	}
	if len(keys) == 0 {
		return nil, errors.New("resumed: a keyring needs at least one key")
	}
	keyring := &Keyring{}
	keyring.keys.Store(&keys)
	return keyring, nil
}

// String shows the ids of the keys, never the keys.
func (k *Keyring) String() string {
	return "Keyring(" + keyIDs(k.current()) + ")"
}

// GoString is String, for %#v.
func (k *Keyring) GoString() string { return k.String() }

func keyIDs(keys []*fleetKey) string {
	var ids []string
	for _, key := range keys {
		ids = append(ids, hex.EncodeToString(key.id[:]))
	}
	return strings.Join(ids, ", ")
}

func (k *Keyring) seal(key storeKey, plaintext []byte, notAfter time.Time) []byte {
	return k.current()[0].seal(key, plaintext, notAfter, thisProcess.nonce())
}

// open returns the plaintext of a sealed value, any bytes at all, that the server returned for key, and the end of its life.
func (k *Keyring) open(key storeKey, sealed []byte, now time.Time) (plaintext []byte, notAfter time.Time, err error) {
	return openSealed(k.current(), key, sealed, now)
}

func openSealed(keys []*fleetKey, key storeKey, sealed []byte, now time.Time) (plaintext []byte, notAfter time.Time, err error) {
	if len(sealed) < headerSize+nonceSize+tagSize || sealed[0] != sealedVersion {
		return nil, time.Time{}, errMalformed
	}
	for _, fleetKey := range keys {
		if [keyIDSize]byte(sealed[1:]) != fleetKey.id {
			continue
		}
		if plaintext, err = fleetKey.open(key, sealed); err != nil {
			return nil, time.Time{}, err
		}
		notAfter = time.Unix(int64(binary.BigEndian.Uint64(sealed[1+keyIDSize:])), 0)
		if !now.Before(notAfter) {
			return nil, time.Time{}, errExpired
		}
		return plaintext, notAfter, nil
	}
	return nil, time.Time{}, errUnknownKey
}

func (k *Keyring) issueID(namespace string, now time.Time) []byte {
	return k.current()[0].issueID(namespace, now, thisProcess.nonce())
}

// openID returns the time at which the fleet issued id, any bytes at all, for namespace; ok is false if it did not.
func (k *Keyring) openID(namespace string, id []byte) (issued time.Time, ok bool) {
	if len(id) != idSize {
		return time.Time{}, false
	}
	for _, key := range k.current() {
		if issued, ok = key.openID(namespace, id); ok {
			return issued, true
		}
	}
	return time.Time{}, false
}

func (k *Keyring) current() []*fleetKey {
	if k.files != nil {
		k.files.follow(k.read)
	}
	return *k.keys.Load()
}

// lastReload is that of the keyring's file, which is checked if it is time; ok is false if the keys are not from a file.
func (k *Keyring) lastReload() (successful bool, at time.Time, ok bool) {
	if k.files == nil {
		return false, time.Time{}, false
	}
	k.current()
	successful, at = k.files.lastReload()
	return successful, at, true
}

func (k *Keyring) read() (slog.Attr, error) {
	keys, err := readKeyring(k.files.paths[0])
	if err != nil {
		return slog.Attr{}, err
	}
	k.keys.Store(&keys)
	return slog.String("keys", keyIDs(keys)), nil
}

func readKeyring(path string) ([]*fleetKey, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("resumed: keyring: %w; make one with `resumed keygen %s`", err, path)
	}
	defer func() { _ = file.Close() }()
	status, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("resumed: keyring: %w", err)
	}
	if mode := status.Mode().Perm(); mode&0o027 != 0 && runtime.GOOS != "windows" {
		return nil, fmt.Errorf("resumed: keyring %s: others may read or change it (mode %04o); run `chmod 600 %s`, or give a "+
			"Kubernetes Secret `defaultMode: 0400` (0440 with an fsGroup)", path, mode, path)
	}
	if foreign(status) {
		return nil, fmt.Errorf("resumed: keyring %s: another user owns it, who may change it; run `chown %d %s`",
			path, os.Geteuid(), path)
	}
	var keys []*fleetKey
	lines := bufio.NewScanner(file)
	for number := 1; lines.Scan(); number++ {
		encoded, _, _ := bytes.Cut(lines.Bytes(), []byte("#"))
		encoded = bytes.TrimSpace(encoded)
		if len(encoded) == 0 {
			continue
		}
		secret, err := base64.StdEncoding.DecodeString(string(encoded))
		if err != nil || len(secret) != keySize { // the line is not shown: it may be a key with one wrong character
			return nil, fmt.Errorf("resumed: keyring %s, line %d: not a key (base64 of %d bytes)", path, number, keySize)
		}
		keys = append(keys, newFleetKey(secret))
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("resumed: keyring %s: %w", path, err)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("resumed: keyring %s: holds no key; make one with `resumed keygen`", path)
	}
	return keys, nil
}
