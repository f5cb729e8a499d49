package io.github.resumed.netty;

import java.nio.ByteBuffer;
import java.security.GeneralSecurityException;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.Optional;
import javax.crypto.AEADBadTagException;
import javax.crypto.Cipher;
import javax.crypto.spec.GCMParameterSpec;
import javax.crypto.spec.SecretKeySpec;

/** A key of the keyring: it seals values for the store, and names ticket keys. Printed, it shows its id. */
final class FleetKey {
    static final int KEY_BYTES = 32;
    static final int NONCE_BYTES = 12;
    static final byte SEALED_VERSION = 2;
    private static final int ID_BYTES = 4;
    private static final int HEADER_BYTES = 13; // version, key id, not_after
    private static final int TAG_BYTES = 16;
    private static final int LEAST_SEALED_BYTES = HEADER_BYTES + NONCE_BYTES + TAG_BYTES;

    private final byte[] secret;
    private final byte[] id;

    FleetKey(byte[] secret) {
        this.secret = secret.clone();
        this.id = Arrays.copyOf(Crypto.sha256(secret), ID_BYTES);
    }

    /** A sealed value that opened; {@code notAfter} is in Unix seconds. */
    record Opened(byte[] plaintext, long notAfter) {}

    /** Returns the first 4 bytes of the key's hash, which may be shown. */
    byte[] id() {
        return id.clone();
    }

    byte[] seal(byte[] storeKey, byte[] plaintext, long notAfter, byte[] nonce) {
        byte[] header = ByteBuffer.allocate(HEADER_BYTES).put(SEALED_VERSION).put(id).putLong(notAfter).array();
        try {
            return Crypto.concat(header, nonce, cipher(Cipher.ENCRYPT_MODE, storeKey, header, nonce).doFinal(plaintext));
        } catch (GeneralSecurityException impossible) {
            throw new IllegalStateException(impossible);
        }
    }

    /** Returns whether a value, any bytes at all, says that this key sealed it. */
    boolean sealed(byte[] value) {
        return value.length >= LEAST_SEALED_BYTES && value[0] == SEALED_VERSION && Arrays.equals(value, 1, 1 + ID_BYTES, id, 0, ID_BYTES);
    }

    /** Opens a value that this key {@link #sealed}; empty if it is not authentic. */
    Optional<Opened> open(byte[] storeKey, byte[] value) {
        byte[] header = Arrays.copyOf(value, HEADER_BYTES);
        byte[] nonce = Arrays.copyOfRange(value, HEADER_BYTES, HEADER_BYTES + NONCE_BYTES);
        int start = HEADER_BYTES + NONCE_BYTES;
        try {
            byte[] plaintext = cipher(Cipher.DECRYPT_MODE, storeKey, header, nonce).doFinal(value, start, value.length - start);
            return Optional.of(new Opened(plaintext, ByteBuffer.wrap(header).getLong(1 + ID_BYTES)));
        } catch (AEADBadTagException notAuthentic) {
            return Optional.empty();
        } catch (GeneralSecurityException impossible) {
            throw new IllegalStateException(impossible);
        }
    }

    /** Returns the end of a ticket key's name, which shows that the fleet has named the key. */
    byte[] macOfTicketName(String namespace, byte[] head) {
        byte[] key = Crypto.hkdf(secret, new byte[0], "resumed/v1 ticket name", Crypto.HASH_BYTES);
        return Arrays.copyOf(Crypto.hmac(key, Crypto.text(namespace + "\0"), head), 4);
    }

    private Cipher cipher(int mode, byte[] storeKey, byte[] header, byte[] nonce) throws GeneralSecurityException {
        byte[] key = Crypto.hkdf(secret, storeKey, "resumed/v1 seal", KEY_BYTES);
        Cipher cipher = Cipher.getInstance("AES/GCM/NoPadding");
        cipher.init(mode, new SecretKeySpec(key, "AES"), new GCMParameterSpec(8 * TAG_BYTES, nonce));
        cipher.updateAAD(header);
        cipher.updateAAD(storeKey);
        return cipher;
    }

    @Override
    public String toString() {
        return "FleetKey(" + HexFormat.of().formatHex(id) + ")";
    }
}
