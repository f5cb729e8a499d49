package resumed

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"
	"time"
)

// ticketVectors are protos/vectors/tickets.json, the formats that the clients of all languages share.
type ticketVectors struct {
	Secrets []struct {
		Namespace  string
		Key        hexBytes
		Start      uint32
		Rotation   uint32
		Generation uint8
		Secret     hexBytes
		Created    int64 `json:"created_microseconds"`
		Lifetime   int64
		NotAfter   int64 `json:"not_after"`
		Address    hexBytes
		Sealed     hexBytes
		Name       hexBytes
		Aead32     hexBytes
	}
	States []struct {
		Fingerprint hexBytes
		Lineage     hexBytes
		Negotiated  int64 `json:"negotiated_microseconds"`
		End         int64
		ServerName  string `json:"server_name"`
		State       hexBytes
		RemovalKey  hexBytes `json:"removal_key"`
		Namespace   string
	}
	Tickets []struct {
		Aead32    hexBytes
		Name      hexBytes
		Salt      hexBytes
		Plaintext hexBytes
		Ticket    hexBytes
		Namespace string
		UseKey    hexBytes `json:"use_key"`
	}
}

func readTicketVectors(t *testing.T) (vectors ticketVectors) {
	t.Helper()
	readVectors(t, "tickets.json", &vectors)
	return vectors
}

func equal(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s: %x, want %x", what, got, want)
	}
}

func TestTicketSecretsAreThoseOfAllClients(t *testing.T) {
	for _, vector := range readTicketVectors(t).Secrets {
		key := newFleetKey(vector.Key)
		epoch := epoch{vector.Start, vector.Rotation, vector.Generation}
		if end := epoch.notAfter(time.Duration(vector.Lifetime) * time.Second).Unix(); end != vector.NotAfter {
			t.Errorf("not_after: %d, want %d", end, vector.NotAfter)
		}
		created, alive := time.UnixMicro(vector.Created), time.Unix(vector.NotAfter-1, 0)
		opened, err := openTicketSecret(vector.Namespace, key, epoch, vector.Sealed, alive)
		check(t, err)
		made := newTicketSecret(vector.Namespace, key, epoch, vector.Secret, created, time.Unix(vector.NotAfter, 0))
		again, err := openTicketSecret(vector.Namespace, key, epoch, made.sealed, alive)
		check(t, err)
		for _, secret := range []*ticketSecret{opened, made, again} {
			equal(t, "address", secret.address[:], vector.Address)
			equal(t, "name", secret.name[:], vector.Name)
			equal(t, "aead32", secret.key, vector.Aead32)
			if !secret.created.Equal(created) || secret.notAfter.Unix() != vector.NotAfter || secret.name.epoch() != epoch {
				t.Errorf("%v, %v, %v", secret.created, secret.notAfter, secret.name.epoch())
			}
		}
		if !opened.name.namedBy(key, vector.Namespace) || opened.name.namedBy(key, "other") || opened.name.namedBy(newFleetKey(make([]byte, keySize)), vector.Namespace) {
			t.Error("a name is not that of its namespace and key alone")
		}
		for n := range vector.Sealed {
			spoilt := bytes.Clone(vector.Sealed)
			spoilt[n] ^= 1
			if _, err := openTicketSecret(vector.Namespace, key, epoch, spoilt, alive); err == nil {
				t.Error("opened a value with another byte ", n)
			}
		}
		if _, err := openTicketSecret("other", key, epoch, vector.Sealed, alive); err == nil {
			t.Error("opened the value of another namespace")
		}
		if _, err := openTicketSecret(vector.Namespace, key, epoch.next(), vector.Sealed, alive); err == nil {
			t.Error("opened the value of another epoch")
		}
	}
}

func TestTicketStatesAreThoseOfAllClients(t *testing.T) {
	for _, vector := range readTicketVectors(t).States {
		state := ticketState{
			fingerprint: fingerprint(vector.Fingerprint), lineage: lineage(vector.Lineage), negotiated: time.UnixMicro(vector.Negotiated),
			end: time.Unix(vector.End, 0), serverName: nameDigest(strings.ToUpper(vector.ServerName)),
		}
		equal(t, "state", state.appendTo(nil), vector.State)
		key := lineageKey(vector.Namespace, state.lineage)
		equal(t, "removal key", key[:], vector.RemovalKey)
		parsed, session, err := parseTicket(append(vector.State, "session"...))
		check(t, err)
		if parsed != state || string(session) != "session" {
			t.Error(parsed, string(session))
		}
		vector.State[7]++
		for _, malformed := range [][]byte{nil, vector.State[:stateSize-1], vector.State} {
			if _, _, err := parseTicket(malformed); err == nil {
				t.Errorf("parsed %x", malformed)
			}
		}
	}
}

func TestTicketsAreThoseOfAllClients(t *testing.T) {
	for _, vector := range readTicketVectors(t).Tickets {
		key := deriveKey(vector.Aead32, vector.Salt, ticketInfo)
		plaintext, err := openTicket(key, vector.Ticket)
		check(t, err)
		equal(t, "plaintext", plaintext, vector.Plaintext)
		state, session, err := parseTicket(plaintext)
		check(t, err)
		equal(t, "ticket", sealTicket(keyName(vector.Name), key, [saltSize]byte(vector.Salt), state, session), vector.Ticket)
		use := useKey(vector.Namespace, vector.Ticket)
		equal(t, "use key", use[:], vector.UseKey)
		for n := range vector.Ticket {
			spoilt := bytes.Clone(vector.Ticket)
			spoilt[n] ^= 1
			if _, err := openTicket(key, spoilt); err == nil {
				t.Error("opened a ticket with another byte ", n)
			}
		}
	}
}

func TestKeysAreThoseOfHKDF(t *testing.T) {
	for n := range byte(100) {
		key, salt := sha256.Sum256([]byte{n}), sha256.Sum256([]byte{n, n})
		own := deriveKey(key[:], salt[:saltSize], ticketInfo)
		equal(t, "key", own[:], derive(key[:], salt[:saltSize], ticketInfo, ticketKeySize))
	}
}

// No verb prints anything of a secret.
func TestSecretsAreNotPrinted(t *testing.T) {
	vector := readTicketVectors(t).Secrets[0]
	secret, err := openTicketSecret(
		vector.Namespace, newFleetKey(vector.Key), epoch{vector.Start, vector.Rotation, vector.Generation}, vector.Sealed, time.Unix(0, 0))
	check(t, err)
	for _, verb := range []string{"%v", "%+v", "%#v", "%x", "%d", "%s", "%q"} {
		if text := fmt.Sprintf(verb, secret); text != "ticketSecret" {
			t.Errorf("%s: %s", verb, text)
		}
	}
}
