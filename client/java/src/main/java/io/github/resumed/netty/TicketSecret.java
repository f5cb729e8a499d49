package io.github.resumed.netty;

import io.netty.handler.ssl.OpenSslSessionTicketKey;
import java.nio.ByteBuffer;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.Optional;

/** The secret of an epoch, of which ticket keys are derived (protos/README.md). Printed, it shows the name of its keys, as each ticket does. */
final class TicketSecret {
    static final int SECRET_BYTES = 32;
    private static final byte VERSION = 1;
    private static final int ENCODED_BYTES = 1 + 8 + SECRET_BYTES;

    final String namespace;
    final FleetKey key;
    final Epoch epoch;
    /** When a frontend proposed it, in microseconds after the Unix epoch. */
    final long createdMicroseconds;
    /** When it is erased, in Unix seconds. */
    final long notAfter;

    private final byte[] secret;

    TicketSecret(String namespace, FleetKey key, Epoch epoch, byte[] secret, long createdMicroseconds, long notAfter) {
        this.namespace = namespace;
        this.key = key;
        this.epoch = epoch;
        this.secret = secret.clone();
        this.createdMicroseconds = createdMicroseconds;
        this.notAfter = notAfter;
    }

    /** Returns the secret with a plaintext; empty for a malformed one. */
    static Optional<TicketSecret> decode(String namespace, FleetKey key, Epoch epoch, FleetKey.Opened opened) {
        byte[] plaintext = opened.plaintext();
        if (plaintext.length != ENCODED_BYTES || plaintext[0] != VERSION) return Optional.empty();
        byte[] secret = Arrays.copyOfRange(plaintext, 9, ENCODED_BYTES);
        return Optional.of(new TicketSecret(namespace, key, epoch, secret, ByteBuffer.wrap(plaintext).getLong(1), opened.notAfter()));
    }

    /** Returns the plaintext of its sealed value. */
    byte[] encode() {
        return ByteBuffer.allocate(ENCODED_BYTES).put(VERSION).putLong(createdMicroseconds).put(secret).array();
    }

    byte[] address() {
        return epoch.address(namespace, key);
    }

    /** Returns the name of its keys (16 bytes), with which each of its tickets begins. */
    byte[] name() {
        byte[] head = Crypto.concat(epoch.encode(), derive("tag", 4));
        return Crypto.concat(head, key.macOfTicketName(namespace, head));
    }

    /** Returns name, HMAC-SHA256 key and AES-128 key, of 16 bytes each. */
    byte[] raw48() {
        return Crypto.concat(name(), derive("raw48", 32));
    }

    OpenSslSessionTicketKey ticketKey() {
        return ticketKey(raw48());
    }

    static OpenSslSessionTicketKey ticketKey(byte[] raw48) {
        return new OpenSslSessionTicketKey(
                Arrays.copyOf(raw48, 16), Arrays.copyOfRange(raw48, 16, 32), Arrays.copyOfRange(raw48, 32, 48));
    }

    /** Overwrites the secret. */
    void erase() {
        Arrays.fill(secret, (byte) 0);
    }

    private byte[] derive(String form, int length) {
        return Crypto.hkdf(secret, new byte[0], "resumed/v1 ticket key\0" + form, length);
    }

    @Override
    public String toString() {
        return "TicketSecret(" + HexFormat.of().formatHex(name()) + ")";
    }
}
