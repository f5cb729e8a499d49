package io.github.resumed.netty;

import java.io.ByteArrayOutputStream;
import java.nio.charset.StandardCharsets;
import java.security.GeneralSecurityException;
import java.security.MessageDigest;
import java.util.Arrays;
import javax.crypto.Mac;
import javax.crypto.spec.SecretKeySpec;

/** Primitives of the contract (protos/README.md). */
final class Crypto {
    static final int HASH_BYTES = 32;

    private Crypto() {}

    static byte[] sha256(byte[]... parts) {
        try {
            return MessageDigest.getInstance("SHA-256").digest(concat(parts));
        } catch (GeneralSecurityException missing) {
            throw new IllegalStateException(missing); // every Java has it
        }
    }

    static byte[] hmac(byte[] key, byte[]... parts) {
        try {
            Mac mac = Mac.getInstance("HmacSHA256");
            mac.init(new SecretKeySpec(key, "HmacSHA256"));
            return mac.doFinal(concat(parts));
        } catch (GeneralSecurityException missing) {
            throw new IllegalStateException(missing);
        }
    }

    /** Returns HKDF-SHA256 (RFC 5869) of at most 8,160 bytes; an empty salt is one of zeros. */
    static byte[] hkdf(byte[] secret, byte[] salt, String info, int length) {
        byte[] extracted = hmac(salt.length == 0 ? new byte[HASH_BYTES] : salt, secret);
        ByteArrayOutputStream expanded = new ByteArrayOutputStream();
        byte[] block = {};
        for (byte counter = 1; expanded.size() < length; counter++) {
            block = hmac(extracted, block, text(info), new byte[] {counter});
            expanded.writeBytes(block);
        }
        return Arrays.copyOf(expanded.toByteArray(), length);
    }

    static byte[] text(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }

    static byte[] concat(byte[]... parts) {
        ByteArrayOutputStream joined = new ByteArrayOutputStream();
        for (byte[] part : parts) joined.writeBytes(part);
        return joined.toByteArray();
    }
}
