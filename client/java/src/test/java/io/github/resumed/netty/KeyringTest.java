package io.github.resumed.netty;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.FileTime;
import java.nio.file.attribute.PosixFilePermissions;
import java.time.Instant;
import java.util.Base64;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

class KeyringTest {
    private static final String ONE = Base64.getEncoder().encodeToString(new byte[32]);
    private static final String TWO = Base64.getEncoder().encodeToString("a key of thirty-two bytes, really".substring(0, 32).getBytes());

    @TempDir Path directory;

    @Test
    void aChangedFileIsReadAgainAndABadOneIgnored() throws Exception {
        Path file = write(directory, ONE + " # the first\n");
        Keyring keyring = Keyring.load(file);
        String before = keyring.toString();
        change(file, TWO + "\n" + ONE + "\n");
        assertEquals(2, keyring.keys().size());
        assertFalse(keyring.toString().equals(before));
        change(file, "no key\n");
        assertEquals(2, keyring.keys().size());
    }

    @Test
    void aBadFileIsRefusedWithoutShowingIt() throws Exception {
        Path file = write(directory, ONE.substring(1) + "\n");
        String message = assertThrows(ResumedException.class, () -> Keyring.load(file)).getMessage();
        assertTrue(message.contains("line 1"), message);
        assertFalse(message.contains(ONE.substring(1)), message);
        Files.writeString(file, ONE);
        Files.setPosixFilePermissions(file, PosixFilePermissions.fromString("rw-r--r--"));
        assertTrue(assertThrows(ResumedException.class, () -> Keyring.load(file)).getMessage().contains("chmod 600"));
        assertThrows(ResumedException.class, () -> Keyring.load(directory.resolve("missing")));
    }

    static Path write(Path directory, String text) throws Exception {
        Path file = Files.writeString(directory.resolve("fleet.keys"), text);
        return Files.setPosixFilePermissions(file, PosixFilePermissions.fromString("rw-------"));
    }

    /** Changes a file, some time ago. */
    static void change(Path file, String text) throws Exception {
        Files.writeString(file, text);
        Files.setLastModifiedTime(file, FileTime.from(Instant.now().minusSeconds(10)));
    }
}
