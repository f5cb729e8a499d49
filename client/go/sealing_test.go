package resumed

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"testing"
	"time"
)

type hexBytes []byte

func (h *hexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.DecodeString(string(text))
	return err
}

func readVectors(t *testing.T, name string, vectors any) {
	t.Helper()
	text, err := os.ReadFile("../../protos/vectors/" + name)
	if os.IsNotExist(err) {
		t.Skip("the vectors are in the repository, not in the module")
	}
	check(t, err)
	check(t, json.Unmarshal(text, vectors))
}

func vectorKeyring(t *testing.T, keys []hexBytes) *Keyring {
	t.Helper()
	var secrets [][]byte
	for _, key := range keys {
		secrets = append(secrets, key)
	}
	keyring, err := NewKeyring(secrets...)
	check(t, err)
	return keyring
}

// Store keys and sealed values are those of the other languages, byte for byte, and what must not open does not.
func TestSealingVectors(t *testing.T) {
	var vectors struct {
		Keyring []hexBytes
		Opens   []struct {
			Format, Namespace string
			SessionID         hexBytes `json:"session_id"`
			StoreKey          hexBytes `json:"store_key"`
			NotAfter          int64    `json:"not_after"`
			Key, Nonce        hexBytes
			Plaintext, Sealed hexBytes
		}
		DoesNotOpen []struct {
			Case, Reason string
			StoreKey     hexBytes `json:"store_key"`
			Sealed       hexBytes
			Now          int64
		} `json:"does_not_open"`
	}
	readVectors(t, "sealing.json", &vectors)
	keyring := vectorKeyring(t, vectors.Keyring)
	formats := map[string]bool{}
	for _, vector := range vectors.Opens {
		formats[vector.Format] = true
		key := storeKeyOf(vector.Format, vector.Namespace, vector.SessionID)
		if !bytes.Equal(key[:], vector.StoreKey) {
			t.Errorf("%s: store key %x, want %x", vector.Format, key, vector.StoreKey)
		}
		notAfter := time.Unix(vector.NotAfter, 0)
		sealed := newFleetKey(vector.Key).seal(key, vector.Plaintext, notAfter, [nonceSize]byte(vector.Nonce))
		if !bytes.Equal(sealed, vector.Sealed) {
			t.Errorf("%s: sealed %x, want %x", vector.Format, sealed, vector.Sealed)
		}
		plaintext, end, err := keyring.open(key, vector.Sealed, notAfter.Add(-time.Second))
		if err != nil || !bytes.Equal(plaintext, vector.Plaintext) || !end.Equal(notAfter) {
			t.Errorf("%s: opened %x until %v, %v", vector.Format, plaintext, end, err)
		}
	}
	if !formats[format] {
		t.Error("no vector has the format of this language")
	}
	for _, vector := range vectors.DoesNotOpen {
		_, _, err := keyring.open(storeKey(vector.StoreKey), vector.Sealed, time.Unix(vector.Now, 0))
		if err == nil || err.Error() != vector.Reason {
			t.Errorf("%s: %v, want %s", vector.Case, err, vector.Reason)
		}
	}
}

// Envelopes are those of the other languages, byte for byte.
func TestEnvelopeVectors(t *testing.T) {
	var vectors struct {
		Envelopes []struct {
			Fingerprint        hexBytes
			IssuedMicroseconds int64 `json:"issued_microseconds"`
			Session, Envelope  hexBytes
		}
	}
	readVectors(t, "sealing.json", &vectors)
	if len(vectors.Envelopes) == 0 {
		t.Fatal("no vectors")
	}
	for _, vector := range vectors.Envelopes {
		made := envelope{fingerprint(vector.Fingerprint), time.UnixMicro(vector.IssuedMicroseconds), vector.Session}
		if !bytes.Equal(made.bytes(), vector.Envelope) {
			t.Errorf("%x, want %x", made.bytes(), vector.Envelope)
		}
		read, err := parseEnvelope(vector.Envelope)
		if err != nil || read.fingerprint != made.fingerprint || !read.issued.Equal(made.issued) || !bytes.Equal(read.session, made.session) {
			t.Errorf("read %+v, %v", read, err)
		}
	}
	if _, err := parseEnvelope(make([]byte, envelopeHeader-1)); err != errMalformed {
		t.Error("opened an envelope that is too short: ", err)
	}
}

// Sealed ids are those of the other languages, byte for byte, and what must not open does not.
func TestIDVectors(t *testing.T) {
	var vectors struct {
		Keyring []hexBytes
		Opens   []struct {
			Namespace      string
			Issued         int64
			Key, Nonce, ID hexBytes
		}
		DoesNotOpen []struct {
			Case, Namespace string
			ID              hexBytes
		} `json:"does_not_open"`
	}
	readVectors(t, "ids.json", &vectors)
	keyring := vectorKeyring(t, vectors.Keyring)
	for _, vector := range vectors.Opens {
		issued := time.Unix(vector.Issued, 0)
		if id := newFleetKey(vector.Key).issueID(vector.Namespace, issued, [nonceSize]byte(vector.Nonce)); !bytes.Equal(id, vector.ID) {
			t.Errorf("%s: id %x, want %x", vector.Namespace, id, vector.ID)
		}
		if opened, ok := keyring.openID(vector.Namespace, vector.ID); !ok || !opened.Equal(issued) {
			t.Errorf("%s: opened %v, %v", vector.Namespace, opened, ok)
		}
	}
	for _, vector := range vectors.DoesNotOpen {
		if _, ok := keyring.openID(vector.Namespace, vector.ID); ok {
			t.Errorf("%s: opened", vector.Case)
		}
	}
}
