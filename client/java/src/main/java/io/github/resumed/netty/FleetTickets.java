package io.github.resumed.netty;

import io.grpc.Channel;
import io.netty.handler.ssl.ClientAuth;
import io.netty.handler.ssl.OpenSsl;
import io.netty.handler.ssl.OpenSslServerSessionContext;
import io.netty.handler.ssl.OpenSslSessionTicketKey;
import io.netty.handler.ssl.ReferenceCountedOpenSslContext;
import io.netty.handler.ssl.SslContext;
import io.netty.handler.ssl.SslContextBuilder;
import io.netty.handler.ssl.SslProvider;
import java.io.ByteArrayInputStream;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.security.SecureRandom;
import java.security.cert.CertificateException;
import java.security.cert.CertificateFactory;
import java.security.cert.X509Certificate;
import java.time.Clock;
import java.time.Duration;
import java.util.Collection;
import java.util.HexFormat;
import java.util.List;
import java.util.Locale;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import javax.net.ssl.SSLException;

/**
 * Ticket keys for the Netty servers of a fleet: every server of the namespace resumes the sessions of all others, from tickets that clients
 * keep. The servers agree on the keys through the store, and change them each rotation. No handshake makes a call.
 *
 * <pre>{@code
 * Channel channel = Grpc.newChannelBuilder("dns:///store:7400", InsecureChannelCredentials.create()).build();
 * FleetTickets tickets = FleetTickets.builder(channel, "shop", Keyring.load(Path.of("fleet.keys"))).build();
 * SslContext context = tickets.newServerContext(chain, key, builder -> {});
 * }</pre>
 *
 * <p>A ticket cannot be removed, does not end at its first use, and each resumption brings a new one: see the README.
 */
public final class FleetTickets implements AutoCloseable {
    private static final System.Logger LOGGER = System.getLogger("resumed");
    private static final Pattern NAMESPACE = Pattern.compile("[a-z0-9.-]{1,63}");
    private static final Pattern CERTIFICATE = Pattern.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", Pattern.DOTALL);
    /** DNS names and IP addresses (RFC 5280 section 4.2.1.6). */
    private static final Set<Object> NAME_TYPES = Set.of(2, 7);
    private static final Duration MAX = Duration.ofDays(7);

    private final Builder options;
    private final Agreement agreement;
    private final PurgeWatch watch;
    private final ScheduledExecutorService thread;
    private final List<ReferenceCountedOpenSslContext> contexts = new CopyOnWriteArrayList<>();
    private final CountDownLatch agreed = new CountDownLatch(1);
    /** What the contexts have; written and read under this object's lock. */
    private OpenSslSessionTicketKey[] keys = {};

    private String encrypting = "";
    private Future<?> next;

    private FleetTickets(Builder options) {
        this.options = options;
        SecretStore store = new SecretStore(options.channel, options.namespace);
        int rotation = Math.toIntExact(options.rotation.toSeconds());
        agreement = new Agreement(
                store, options.namespace, options.keyring, rotation, options.lifetime.toSeconds(), Clock.systemUTC(), Math::random);
        thread = Executors.newSingleThreadScheduledExecutor(task -> {
            Thread made = new Thread(task, "resumed");
            made.setDaemon(true);
            return made;
        });
        watch = new PurgeWatch(options.channel, options.namespace, thread, before -> {
            agreement.forget(before);
            step();
        });
        thread.execute(this::step);
        watch.begin();
    }

    /**
     * Returns the settings of a server.
     *
     * @param channel A connection to the store, with TLS and a client certificate if it requires them. It stays the application's.
     * @param namespace 1 to 63 characters of {@code [a-z0-9.-]}: the servers that share it resume each other's sessions.
     * @throws ResumedException The namespace is malformed, or Netty's OpenSSL is missing.
     */
    public static Builder builder(Channel channel, String namespace, Keyring keyring) {
        return new Builder(channel, namespace, keyring);
    }

    /** Settings with defaults. */
    public static final class Builder {
        private final Channel channel;
        private final String namespace;
        private final Keyring keyring;
        private Duration rotation = Duration.ofHours(1);
        private Duration lifetime = Duration.ofHours(2);
        private boolean tls12;

        private Builder(Channel channel, String namespace, Keyring keyring) {
            if (!NAMESPACE.matcher(namespace).matches()) {
                throw new ResumedException("namespace " + namespace + ": must have 1 to 63 characters of [a-z0-9.-]");
            }
            if (!OpenSsl.isAvailable()) {
                throw new ResumedException(
                        "Netty's OpenSSL is not available: add io.netty:netty-tcnative-boringssl-static", OpenSsl.unavailabilityCause());
            }
            this.channel = channel;
            this.namespace = namespace;
            this.keyring = keyring;
        }

        /** After how long the keys change: 1 second to 7 days, whole seconds, the same at every server; 1 hour by default. */
        public Builder rotation(Duration rotation) {
            this.rotation = inRange("rotation", rotation);
            return this;
        }

        /** The lifetime of a key after its last ticket was issued: 1 second to 7 days, the same at every server; 2 hours by default. */
        public Builder lifetime(Duration lifetime) {
            this.lifetime = inRange("lifetime", lifetime);
            return this;
        }

        /** Whether TLS 1.2 has tickets as well; false by default, since a stolen key then opens recorded connections. */
        public Builder tls12(boolean tls12) {
            this.tls12 = tls12;
            return this;
        }

        /** Begins to agree on keys, in a thread of its own. */
        public FleetTickets build() {
            return new FleetTickets(this);
        }

        private static Duration inRange(String name, Duration value) {
            if (value.compareTo(Duration.ofSeconds(1)) < 0 || value.compareTo(MAX) > 0 || value.getNano() > 0) {
                throw new ResumedException(name + " " + value + ": must be 1 second to 7 days, in whole seconds");
            }
            return value;
        }
    }

    /**
     * Makes a context whose connections resume the sessions of all contexts of the namespace that have the same names in their certificate.
     *
     * <p>It requests no client certificates, because a ticket would resume without them: do not change that for an engine of it
     * ({@code setNeedClientAuth}). Until the servers have agreed on keys it issues no tickets.
     *
     * @param chain PEM file with the certificate and its chain.
     * @param key PEM file (PKCS #8) with the key.
     * @param settings What else the application sets, such as protocols and ciphers. Its provider, client authentication, TLS versions and session
     *     settings are overwritten.
     * @throws SSLException Netty cannot make the context.
     * @throws ResumedException The certificate cannot be read.
     */
    public SslContext newServerContext(File chain, File key, Consumer<SslContextBuilder> settings) throws SSLException {
        SslContextBuilder builder = SslContextBuilder.forServer(chain, key);
        settings.accept(builder);
        SslContext context = builder.keyManager(chain, key)
                .sslProvider(SslProvider.OPENSSL)
                .clientAuth(ClientAuth.NONE)
                .protocols(options.tls12 ? new String[] {"TLSv1.3", "TLSv1.2"} : new String[] {"TLSv1.3"})
                .sessionTimeout(options.lifetime.toSeconds())
                .build();
        OpenSslServerSessionContext sessions = (OpenSslServerSessionContext) context.sessionContext();
        sessions.setSessionCacheEnabled(false);
        byte[] binding = Crypto.sha256(Crypto.text("resumed/v1\0netty\0" + options.namespace + "\0"), identityOf(chain));
        if (!sessions.setSessionIdContext(binding)) throw new ResumedException("the session id context cannot be set");
        synchronized (this) {
            if (keys.length > 0) sessions.setTicketKeys(keys);
            contexts.add((ReferenceCountedOpenSslContext) context);
        }
        return context;
    }

    /**
     * Waits until the servers have agreed on keys, so that the first connection gets a ticket.
     *
     * @return Whether they have, within the time.
     */
    public boolean awaitAgreement(Duration patience) throws InterruptedException {
        return agreed.await(patience.toMillis(), TimeUnit.MILLISECONDS);
    }

    /** Ends the agreement. The contexts go on to serve: tickets of the fleet do not resume there any more. */
    @Override
    public void close() {
        watch.end();
        thread.shutdownNow();
        synchronized (this) {
            if (keys.length > 0) apply(List.of());
        }
    }

    /** Returns the names of the keys, which each ticket shows as well; the first one encrypts. */
    @Override
    public synchronized String toString() {
        return "FleetTickets(" + options.namespace + ": " + encrypting + ")";
    }

    /** Takes the next step of the agreement, now and when it is due. */
    private void step() {
        if (next != null) next.cancel(false);
        long milliseconds = agreement.step();
        synchronized (this) {
            if (thread.isShutdown()) return;
            apply(agreement.secrets());
            next = thread.schedule(this::step, milliseconds, TimeUnit.MILLISECONDS);
        }
        if (!encrypting.isEmpty()) agreed.countDown();
    }

    /** Gives the contexts their keys; without one, a key of this object's own, which opens no ticket of others. */
    private void apply(List<TicketSecret> secrets) {
        String names = String.join(", ", secrets.stream().map(secret -> HexFormat.of().formatHex(secret.name())).toList());
        if (names.equals(encrypting)) return;
        keys = secrets.isEmpty()
                ? new OpenSslSessionTicketKey[] {TicketSecret.ticketKey(randomKey())}
                : secrets.stream().map(TicketSecret::ticketKey).toArray(OpenSslSessionTicketKey[]::new);
        contexts.removeIf(context -> context.refCnt() == 0);
        for (ReferenceCountedOpenSslContext context : contexts) context.sessionContext().setTicketKeys(keys);
        encrypting = names;
        LOGGER.log(System.Logger.Level.INFO, "namespace {0}: the ticket keys are now {1}", options.namespace, names);
    }

    private static byte[] randomKey() {
        byte[] key = new byte[OpenSslSessionTicketKey.TICKET_KEY_SIZE];
        new SecureRandom().nextBytes(key);
        return key;
    }

    /** Returns the names in the first certificate of a PEM file, or its hash if it has none: what a client has verified. */
    private static byte[] identityOf(File chain) {
        try {
            Matcher pem = CERTIFICATE.matcher(Files.readString(chain.toPath(), StandardCharsets.ISO_8859_1));
            if (!pem.find()) throw new CertificateException("has no certificate");
            InputStream encoded = new ByteArrayInputStream(pem.group().getBytes(StandardCharsets.ISO_8859_1));
            X509Certificate certificate = (X509Certificate) CertificateFactory.getInstance("X.509").generateCertificate(encoded);
            Collection<List<?>> names = certificate.getSubjectAlternativeNames();
            TreeSet<String> known = new TreeSet<>();
            for (List<?> name : names == null ? List.<List<?>>of() : names) {
                if (name.get(1) instanceof String text && NAME_TYPES.contains(name.get(0))) {
                    known.add(name.get(0) + ":" + text.toLowerCase(Locale.ROOT));
                }
            }
            return known.isEmpty() ? Crypto.sha256(certificate.getEncoded()) : Crypto.text(String.join("\0", known));
        } catch (IOException | CertificateException error) {
            throw new ResumedException("certificate " + chain + ": " + error.getMessage(), error);
        }
    }
}
