package io.github.resumed.netty;

import java.security.SecureRandom;
import java.time.Clock;
import java.time.Instant;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collection;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.TreeMap;
import java.util.function.DoubleSupplier;

/**
 * Agreement on ticket secrets: the frontends of a fleet make one for each epoch, through the store. Keys of the store are write-once, so of
 * several proposals one wins, and every frontend has that one. All methods are called by one thread.
 */
final class Agreement {
    /** Generations of a secret that are tried in a row. */
    static final int MAX_GENERATIONS = 8;
    /** The present secret is compared with the store's after this time, or after a rotation if that is shorter. */
    static final int MAX_RECHECK_SECONDS = 3600;
    /** The first pause after calls that failed, and the longest: it doubles each time in a row. */
    static final long FIRST_RETRY_MILLISECONDS = 50;
    static final long MAX_RETRY_MILLISECONDS = 5000;

    /** The longest time between two steps: the keyring may have lost a key. */
    private static final long LOOK_MILLISECONDS = 1000;

    private static final System.Logger LOGGER = System.getLogger("resumed");

    private final SecretStore store;
    private final String namespace;
    private final Keyring keyring;
    private final int rotation;
    private final long lifetime;
    private final Clock clock;
    private final DoubleSupplier random;
    private final SecureRandom secrets = new SecureRandom();

    /** By the start of the epoch. */
    private final TreeMap<Long, TicketSecret> agreed = new TreeMap<>();
    /** To be tried next, by the start of the epoch. */
    private final Map<Long, Integer> generations = new HashMap<>();
    private boolean begun;
    /** When to agree on the epoch with this start. */
    private long following = -1;
    private double followingDue;
    private double recheckDue;
    private long retryMilliseconds;

    /**
     * @param rotation The length of an epoch in seconds.
     * @param lifetime The longest life of a ticket in seconds.
     * @param random Returns a number from 0 to 1, which spreads the calls of a fleet.
     */
    Agreement(SecretStore store, String namespace, Keyring keyring, int rotation, long lifetime, Clock clock, DoubleSupplier random) {
        this.store = store;
        this.namespace = namespace;
        this.keyring = keyring;
        this.rotation = rotation;
        this.lifetime = lifetime;
        this.clock = clock;
        this.random = random;
    }

    /** Returns the secrets that open tickets; the first one encrypts. Empty where there is none to encrypt with. */
    List<TicketSecret> secrets() {
        double now = now();
        Optional<TicketSecret> current = current(now);
        if (current.isEmpty()) return List.of();
        List<TicketSecret> found = new ArrayList<>(List.of(current.get()));
        agreed.values().stream().filter(secret -> secret != current.get() && now < secret.notAfter).forEach(found::add);
        return found;
    }

    /** Makes the calls that are due, and returns the milliseconds until the next step. */
    long step() {
        double now = now();
        erase(now);
        try {
            doDue(now);
        } catch (RuntimeException error) {
            if (retryMilliseconds == 0) {
                LOGGER.log(System.Logger.Level.WARNING, "namespace {0}: no agreement on ticket keys: {1}", namespace, error.getMessage());
            }
            retryMilliseconds = Math.min(Math.max(2 * retryMilliseconds, FIRST_RETRY_MILLISECONDS), MAX_RETRY_MILLISECONDS);
            return (long) (retryMilliseconds * (0.5 + random.getAsDouble() / 2));
        }
        if (retryMilliseconds > 0) {
            LOGGER.log(System.Logger.Level.INFO, "namespace {0}: the ticket keys are agreed on again", namespace);
        }
        retryMilliseconds = 0;
        return Math.max(0, Math.min((long) Math.ceil((nextTime() - now()) * 1000), LOOK_MILLISECONDS));
    }

    /** Ends the secrets that were created before a time, or all: their sessions were purged. The next step agrees on others. */
    void forget(Optional<Instant> createdBefore) {
        for (TicketSecret secret : List.copyOf(agreed.values())) {
            if (createdBefore.isEmpty() || secret.createdMicroseconds < microsecondsOf(createdBefore.get())) drop(secret);
        }
    }

    private void doDue(double now) {
        Epoch present = Epoch.at(now, rotation);
        if (following != present.next().start()) {
            following = present.next().start();
            followingDue = now + random.getAsDouble() * (following - now);
        }
        List<Epoch> wanted = new ArrayList<>();
        if (!agreed.containsKey(present.start())) wanted.add(present);
        if (!agreed.containsKey(following) && (!begun || now >= followingDue)) wanted.add(present.next());
        TicketSecret own = agreed.get(present.start());
        if (!wanted.isEmpty()) {
            agree(wanted);
        } else if (own != null && now >= recheckDue) {
            recheck(own);
        } else {
            return;
        }
        begun = true;
        recheckDue = now + Math.min(rotation, MAX_RECHECK_SECONDS) * (0.5 + random.getAsDouble() / 2);
    }

    private double nextTime() {
        long next = Epoch.at(now(), rotation).next().start();
        return Math.min(Math.min(next, recheckDue), agreed.containsKey(next) ? next : followingDue);
    }

    /** Agrees on the secrets of epochs: at most three calls, as a rule. */
    private void agree(List<Epoch> epochs) {
        FleetKey key = keyring.keys().get(0);
        List<Epoch> open = epochs;
        for (int tries = 0; tries < MAX_GENERATIONS; tries++) {
            List<Epoch> wanted = open.stream().map(epoch -> epoch.withGeneration(generations.getOrDefault(epoch.start(), 0))).toList();
            Map<Long, TicketSecret> found = fetch(key, wanted);
            propose(key, missing(wanted, found), found);
            found.values().forEach(this::adopt);
            open = missing(wanted, found);
            if (open.isEmpty()) return;
            open.forEach(this::skipGeneration);
        }
        throw new IllegalStateException(MAX_GENERATIONS + " values in a row cannot be opened, or were removed");
    }

    /** Proposes secrets; where another frontend was first, gets its secret. */
    private void propose(FleetKey key, List<Epoch> epochs, Map<Long, TicketSecret> found) {
        List<TicketSecret> proposals = epochs.stream().map(epoch -> newSecret(key, epoch)).toList();
        for (TicketSecret secret : put(proposals)) found.put(secret.epoch.start(), secret);
        found.putAll(fetch(key, missing(epochs, found)));
    }

    private TicketSecret newSecret(FleetKey key, Epoch epoch) {
        byte[] secret = randomBytes(TicketSecret.SECRET_BYTES);
        return new TicketSecret(namespace, key, epoch, secret, microsecondsOf(clock.instant()), epoch.notAfter(lifetime));
    }

    /** Goes on with the next generation: a value cannot be opened, or was removed. */
    private void skipGeneration(Epoch epoch) {
        if (epoch.generation() == Epoch.MAX_GENERATION) {
            throw new IllegalStateException("no generation of the ticket secret is left in this epoch");
        }
        generations.put(epoch.start(), epoch.generation() + 1);
        LOGGER.log(
                System.Logger.Level.WARNING,
                "namespace {0}: generation {1} of a ticket secret cannot be opened or was removed, the next one replaces it",
                namespace,
                epoch.generation());
    }

    /** Compares a secret with the store's: a failover may have lost it, and an operator may have removed it. */
    private void recheck(TicketSecret own) {
        TicketSecret found = fetch(own.key, List.of(own.epoch)).get(own.epoch.start());
        if (found != null) {
            adopt(found);
        } else if (put(List.of(own)).isEmpty()) {
            drop(own);
            agree(List.of(own.epoch.withGeneration(0)));
        }
    }

    /** Puts secrets, and returns those that the store accepted. */
    private List<TicketSecret> put(List<TicketSecret> secrets) {
        double now = now();
        List<SecretStore.Sealed> values = new ArrayList<>();
        for (TicketSecret secret : secrets) {
            byte[] address = secret.address();
            byte[] value = secret.key.seal(address, secret.encode(), secret.notAfter, randomBytes(FleetKey.NONCE_BYTES));
            values.add(new SecretStore.Sealed(address, value, (long) ((secret.notAfter - now) * 1000), secret.createdMicroseconds));
        }
        List<Boolean> accepted = store.put(values);
        List<TicketSecret> found = new ArrayList<>();
        for (int index = 0; index < secrets.size(); index++) if (accepted.get(index)) found.add(secrets.get(index));
        return found;
    }

    /** Gets the secrets of epochs, and returns those that can be opened, by the start of their epoch. */
    private Map<Long, TicketSecret> fetch(FleetKey key, List<Epoch> epochs) {
        List<byte[]> addresses = epochs.stream().map(epoch -> epoch.address(namespace, key)).toList();
        List<Optional<byte[]>> values = store.get(addresses);
        Map<Long, TicketSecret> found = new HashMap<>();
        for (int index = 0; index < epochs.size(); index++) {
            Epoch epoch = epochs.get(index);
            byte[] address = addresses.get(index);
            values.get(index).flatMap(value -> open(key, epoch, address, value)).ifPresent(secret -> found.put(epoch.start(), secret));
        }
        return found;
    }

    private Optional<TicketSecret> open(FleetKey key, Epoch epoch, byte[] address, byte[] value) {
        Optional<TicketSecret> secret =
                Optional.of(value)
                        .filter(key::sealed)
                        .flatMap(sealed -> key.open(address, sealed))
                        .filter(opened -> now() < opened.notAfter())
                        .flatMap(opened -> TicketSecret.decode(namespace, key, epoch, opened));
        if (secret.isEmpty()) {
            LOGGER.log(System.Logger.Level.WARNING, "namespace {0}: a ticket secret in the store cannot be opened", namespace);
        }
        return secret;
    }

    private void adopt(TicketSecret secret) {
        TicketSecret before = agreed.get(secret.epoch.start());
        if (before != null && Arrays.equals(before.name(), secret.name())) return;
        if (before != null) before.erase();
        agreed.put(secret.epoch.start(), secret);
    }

    private Optional<TicketSecret> current(double now) {
        Collection<TicketSecret> begun = agreed.headMap(Epoch.at(now, rotation).start(), true).descendingMap().values();
        return begun.stream().filter(secret -> now < secret.notAfter).findFirst();
    }

    private void erase(double now) {
        List<FleetKey> keys = keyring.keys();
        for (TicketSecret secret : List.copyOf(agreed.values())) {
            // A key that the keyring has no more may be stolen.
            boolean known = keys.stream().anyMatch(key -> Arrays.equals(key.id(), secret.key.id()));
            if (now >= secret.notAfter || !known) drop(secret);
        }
        generations.keySet().removeIf(start -> start < Epoch.at(now, rotation).start());
    }

    private void drop(TicketSecret secret) {
        agreed.remove(secret.epoch.start());
        secret.erase();
    }

    private byte[] randomBytes(int count) {
        byte[] bytes = new byte[count];
        secrets.nextBytes(bytes);
        return bytes;
    }

    private double now() {
        return microsecondsOf(clock.instant()) / 1e6;
    }

    private static long microsecondsOf(Instant time) {
        return time.getEpochSecond() * 1_000_000 + time.getNano() / 1000;
    }

    private static List<Epoch> missing(List<Epoch> epochs, Map<Long, TicketSecret> found) {
        return epochs.stream().filter(epoch -> !found.containsKey(epoch.start())).toList();
    }
}
