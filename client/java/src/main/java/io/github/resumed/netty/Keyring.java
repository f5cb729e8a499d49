package io.github.resumed.netty;

import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFileAttributes;
import java.nio.file.attribute.PosixFilePermission;
import java.time.Duration;
import java.time.Instant;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Base64;
import java.util.List;
import java.util.Set;

/** The fleet's keys: the first one seals, every one opens. Printed, it shows the ids of its keys, never the keys. */
public final class Keyring {
    private static final System.Logger LOGGER = System.getLogger("resumed");
    /** A file that changed less than this ago may be in the middle of a change. */
    private static final Duration SETTLED = Duration.ofSeconds(1);

    private static final Set<PosixFilePermission> REFUSED =
            Set.of(
                    PosixFilePermission.GROUP_WRITE,
                    PosixFilePermission.OTHERS_READ,
                    PosixFilePermission.OTHERS_WRITE,
                    PosixFilePermission.OTHERS_EXECUTE);

    private final Path path;
    private List<FleetKey> keys;
    private Object version;

    private Keyring(Path path, List<FleetKey> keys, Object version) {
        this.path = path;
        this.keys = keys;
        this.version = version;
    }

    /**
     * Reads a keyring file, as {@code resumed keygen} makes it: a key a line (base64 of 32 bytes), {@code #} begins a comment. It is read
     * again when it has changed; a changed file that cannot be used is logged, and the keys read before stay.
     *
     * @throws ResumedException The file is missing, others may read or change it, or it is malformed.
     */
    public static Keyring load(Path path) {
        try {
            Object version = versionOf(path);
            return new Keyring(path, read(path), version);
        } catch (IOException error) {
            throw new ResumedException("keyring " + path + ": " + error + "; make one with `resumed keygen " + path + "`", error);
        }
    }

    /**
     * Makes a keyring of raw keys, for applications that keep their secrets elsewhere than in files.
     *
     * @throws ResumedException There is no key, or one does not have 32 bytes.
     */
    public static Keyring of(byte[]... keys) {
        if (keys.length == 0 || Arrays.stream(keys).anyMatch(key -> key.length != FleetKey.KEY_BYTES)) {
            throw new ResumedException("a keyring needs at least one key, each of " + FleetKey.KEY_BYTES + " bytes");
        }
        return new Keyring(null, Arrays.stream(keys).map(FleetKey::new).toList(), null);
    }

    synchronized List<FleetKey> keys() {
        if (path == null) return keys;
        try {
            Object present = versionOf(path);
            if (!present.equals(version) && settled()) {
                version = present;
                keys = read(path);
                LOGGER.log(System.Logger.Level.INFO, "the keyring was read again: {0}", this);
            }
        } catch (IOException | UncheckedIOException | ResumedException error) {
            LOGGER.log(System.Logger.Level.WARNING, "keyring {0}: reload failed, keeping the previous keys: {1}", path, error.getMessage());
        }
        return keys;
    }

    private boolean settled() throws IOException {
        return Files.getLastModifiedTime(path).toInstant().isBefore(Instant.now().minus(SETTLED));
    }

    private static Object versionOf(Path path) throws IOException {
        PosixFileAttributes read = Files.readAttributes(path, PosixFileAttributes.class);
        return List.of(read.lastModifiedTime(), read.size(), String.valueOf(read.fileKey()));
    }

    private static List<FleetKey> read(Path path) throws IOException {
        Set<PosixFilePermission> permissions = Files.getPosixFilePermissions(path);
        if (permissions.stream().anyMatch(REFUSED::contains)) {
            throw new ResumedException("keyring " + path + ": others may read or change it; run `chmod 600 " + path + "`");
        }
        List<FleetKey> keys = new ArrayList<>();
        int number = 0;
        for (String line : Files.readAllLines(path, StandardCharsets.ISO_8859_1)) {
            number++;
            String encoded = line.replaceFirst("#.*", "").strip();
            if (!encoded.isEmpty()) keys.add(new FleetKey(decode(path, number, encoded)));
        }
        if (keys.isEmpty()) throw new ResumedException("keyring " + path + ": has no key; make one with `resumed keygen`");
        return List.copyOf(keys);
    }

    private static byte[] decode(Path path, int number, String encoded) {
        byte[] key = {};
        try {
            key = Base64.getDecoder().decode(encoded);
        } catch (IllegalArgumentException malformed) {
            // reported below, without the line: it may be a key with one wrong character
        }
        if (key.length != FleetKey.KEY_BYTES) {
            throw new ResumedException(
                    "keyring " + path + ", line " + number + ": not a key (base64 of " + FleetKey.KEY_BYTES + " bytes)");
        }
        return key;
    }

    @Override
    public synchronized String toString() {
        return "Keyring(" + String.join(", ", keys.stream().map(FleetKey::toString).toList()) + ")";
    }
}
