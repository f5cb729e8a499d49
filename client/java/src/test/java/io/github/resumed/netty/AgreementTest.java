package io.github.resumed.netty;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.ByteString;
import java.nio.file.Path;
import java.time.Clock;
import java.time.Instant;
import java.time.ZoneId;
import java.time.ZoneOffset;
import java.util.Base64;
import java.util.Collections;
import java.util.HexFormat;
import java.util.List;
import java.util.Optional;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

class AgreementTest {
    private static final int ROTATION = 3600;
    private static final long LIFETIME = 7200;
    private static final byte[] KEY = new byte[FleetKey.KEY_BYTES];
    private static final byte[] OTHER_KEY = "a key of thirty-two bytes, really".substring(0, 32).getBytes();

    private final SteppedClock clock = new SteppedClock();
    private FakeStore store;

    @BeforeEach
    void startStore() throws Exception {
        store = new FakeStore();
    }

    @AfterEach
    void stopStore() {
        store.close();
    }

    @Test
    void frontendsHaveTheSecretOfTheFirstOne() {
        Agreement one = agreement(), other = agreement();
        one.step();
        other.step();
        assertEquals(names(one), names(other));
        assertEquals(2, names(one).size(), "the present epoch's and the next one's");
    }

    @Test
    void oldSecretsOpenTicketsUntilTheirEnd() {
        Agreement frontend = agreement();
        frontend.step();
        String first = names(frontend).get(0);
        for (int epoch = 1; epoch <= 3; epoch++) {
            clock.now += ROTATION;
            frontend.step();
            assertFalse(first.equals(names(frontend).get(0)));
            assertTrue(names(frontend).contains(first));
        }
        clock.now += ROTATION;
        frontend.step();
        assertFalse(names(frontend).contains(first));
    }

    @Test
    void inAnOutageTheLastSecretStaysInUseUntilItsEnd() {
        Agreement frontend = agreement();
        frontend.step();
        String next = names(frontend).get(1);
        store.down = true;
        clock.now += 3 * ROTATION;
        assertTrue(frontend.step() <= Agreement.FIRST_RETRY_MILLISECONDS);
        assertEquals(next, names(frontend).get(0));
        clock.now += LIFETIME;
        frontend.step();
        assertEquals(List.of(), names(frontend));
        store.down = false;
        frontend.step();
        assertFalse(names(frontend).isEmpty());
    }

    @Test
    void valuesThatCannotBeOpenedAreReplacedByTheNextGeneration() {
        Epoch present = Epoch.at(clock.now, ROTATION);
        FleetKey key = new FleetKey(KEY);
        store.values.put(ByteString.copyFrom(present.address("shop", key)), ByteString.copyFromUtf8("not a secret"));
        Agreement one = agreement(), other = agreement();
        one.step();
        other.step();
        assertEquals(names(one), names(other));
        byte[] epoch = HexFormat.of().parseHex(names(one).get(0).substring(0, 16));
        assertArrayEquals(present.withGeneration(1).encode(), epoch);
    }

    @Test
    void aSecretThatTheStoreHasLostIsStoredAgain() {
        Agreement one = agreement(), other = agreement();
        one.step();
        store.values.clear();
        clock.now += ROTATION - 1 - clock.now % ROTATION;
        one.step();
        other.step();
        assertEquals(names(one).get(0), names(other).get(0));
    }

    @Test
    void aPurgeEndsTheSecretsOfBefore() {
        Agreement frontend = agreement();
        frontend.step();
        List<String> before = names(frontend);
        frontend.forget(Optional.of(clock.instant()));
        assertEquals(before, names(frontend));
        store.values.clear();
        frontend.forget(Optional.of(clock.instant().plusSeconds(1)));
        assertEquals(List.of(), names(frontend));
        frontend.step();
        assertFalse(names(frontend).isEmpty());
        assertFalse(names(frontend).contains(before.get(0)));
    }

    @Test
    void withoutTheKeyThatSealsItASecretIsDropped(@TempDir Path directory) throws Exception {
        Path file = KeyringTest.write(directory, encoded(KEY) + "\n" + encoded(OTHER_KEY) + "\n");
        Agreement frontend = agreement(Keyring.load(file));
        frontend.step();
        List<String> before = names(frontend);
        KeyringTest.change(file, encoded(OTHER_KEY) + "\n");
        frontend.step();
        assertEquals(1, names(frontend).size(), "the next epoch's is not due");
        assertTrue(Collections.disjoint(before, names(frontend)));
    }

    private Agreement agreement() {
        return agreement(Keyring.of(KEY));
    }

    private Agreement agreement(Keyring keyring) {
        SecretStore secrets = new SecretStore(store.channel, "shop");
        return new Agreement(secrets, "shop", keyring, ROTATION, LIFETIME, clock, () -> 0.5);
    }

    private static String encoded(byte[] key) {
        return Base64.getEncoder().encodeToString(key);
    }

    private static List<String> names(Agreement agreement) {
        return agreement.secrets().stream().map(secret -> HexFormat.of().formatHex(secret.name())).toList();
    }

    private static final class SteppedClock extends Clock {
        long now = 1_790_000_000;

        @Override
        public Instant instant() {
            return Instant.ofEpochSecond(now);
        }

        @Override
        public ZoneId getZone() {
            return ZoneOffset.UTC;
        }

        @Override
        public Clock withZone(ZoneId zone) {
            return this;
        }
    }
}
