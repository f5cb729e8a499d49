package io.github.resumed.netty;

import java.nio.ByteBuffer;

/**
 * A part of time that has a ticket secret, and one attempt to agree on it.
 *
 * @param start Its beginning in Unix seconds: a multiple of its length.
 * @param rotation Its length in seconds.
 * @param generation Above 0 where the secret of an earlier generation cannot be opened, or was removed.
 */
record Epoch(long start, int rotation, int generation) {
    static final int MAX_GENERATION = 255;

    static Epoch at(double now, int rotation) {
        return new Epoch((long) Math.floor(now / rotation) * rotation, rotation, 0);
    }

    Epoch next() {
        return new Epoch(start + rotation, rotation, 0);
    }

    Epoch withGeneration(int generation) {
        return new Epoch(start, rotation, generation);
    }

    /** Returns when its secret is erased: its tickets may live, and a late frontend use it for one more epoch. */
    long notAfter(long lifetime) {
        return start + 2L * rotation + lifetime;
    }

    byte[] encode() {
        return ByteBuffer.allocate(8).putInt((int) start).putInt(rotation << 8 | generation).array();
    }

    /** Returns the store key of its secret that a fleet key seals. */
    byte[] address(String namespace, FleetKey key) {
        return Crypto.sha256(Crypto.text("resumed/v1\0ticket-secret\0" + namespace + "\0"), key.id(), encode());
    }
}
