package io.github.resumed.netty;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.netty.bootstrap.ServerBootstrap;
import io.netty.buffer.ByteBuf;
import io.netty.buffer.Unpooled;
import io.netty.channel.Channel;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelInitializer;
import io.netty.channel.MultiThreadIoEventLoopGroup;
import io.netty.channel.SimpleChannelInboundHandler;
import io.netty.channel.nio.NioIoHandler;
import io.netty.channel.socket.SocketChannel;
import io.netty.channel.socket.nio.NioServerSocketChannel;
import io.netty.handler.ssl.ReferenceCountedOpenSslEngine;
import io.netty.handler.ssl.SslContext;
import io.netty.handler.ssl.SslHandler;
import io.netty.internal.tcnative.SSL;
import io.netty.pkitesting.CertificateBuilder;
import io.netty.pkitesting.X509Bundle;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.nio.charset.StandardCharsets;
import java.security.KeyStore;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.TimeUnit;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** Netty servers of a fleet behind one address, visited by Java's own TLS, whose sessions are for one address. */
class FleetTicketsTest {
    private static final Duration PATIENCE = Duration.ofSeconds(30);
    private static final Keyring KEYRING = Keyring.of(new byte[FleetKey.KEY_BYTES]);

    private final List<AutoCloseable> resources = new ArrayList<>();
    private final MultiThreadIoEventLoopGroup loop = new MultiThreadIoEventLoopGroup(1, NioIoHandler.newFactory());
    private FakeStore store;
    private X509Bundle certificate;
    private SSLContext client;
    private volatile SslContext serving;
    private int port;

    @BeforeEach
    void prepare() throws Exception {
        store = new FakeStore();
        resources.add(store);
        certificate = certificateFor("localhost");
        client = trusting(certificate);
        ServerBootstrap server = new ServerBootstrap().group(loop).channel(NioServerSocketChannel.class);
        server.childHandler(new ChannelInitializer<SocketChannel>() {
            @Override
            protected void initChannel(SocketChannel connection) {
                SslHandler tls = serving.newHandler(connection.alloc());
                connection.pipeline().addLast(tls, new Answer(tls));
            }
        });
        Channel listener = server.bind("127.0.0.1", 0).sync().channel();
        resources.add(() -> listener.close().sync());
        port = ((InetSocketAddress) listener.localAddress()).getPort();
    }

    @AfterEach
    void release() throws Exception {
        for (int index = resources.size() - 1; index >= 0; index--) resources.get(index).close();
        loop.shutdownGracefully(0, 5, TimeUnit.SECONDS).sync();
    }

    @ParameterizedTest
    @ValueSource(strings = {"TLSv1.3", "TLSv1.2"})
    void everyServerResumesTheSessionsOfOthers(String version) throws Exception {
        SslContext one = serve(tickets("shop"), certificate), other = serve(tickets("shop"), certificate);
        assertEquals("full", visit(one, version));
        for (SslContext server : List.of(other, one, other)) assertEquals("resumed", visit(server, version));
    }

    @Test
    void anotherNamespaceAnotherKeyringAndAnotherCertificateMeanAFullHandshake() throws Exception {
        X509Bundle named = certificateFor("other.example");
        client = trusting(certificate, named);
        SslContext home = serve(tickets("shop"), certificate);
        byte[] key = new byte[FleetKey.KEY_BYTES];
        key[0] = 1;
        List<SslContext> strangers = List.of(
                serve(tickets("other"), certificate), serve(tickets("shop", Keyring.of(key)), certificate), serve(tickets("shop"), named));
        for (SslContext stranger : strangers) {
            client = trusting(certificate, named);
            assertEquals("full", visit(home, "TLSv1.3"));
            assertEquals("full", visit(stranger, "TLSv1.3"));
        }
    }

    @Test
    void aPurgeEndsAllTickets() throws Exception {
        FleetTickets tickets = tickets("shop");
        SslContext one = serve(tickets, certificate);
        assertEquals("full", visit(one, "TLSv1.3"));
        assertEquals("resumed", visit(one, "TLSv1.3"));
        String before = tickets.toString();
        store.purge();
        long end = System.nanoTime() + PATIENCE.toNanos();
        while (tickets.toString().equals(before)) {
            assertTrue(System.nanoTime() < end, "the keys did not change");
            Thread.onSpinWait();
        }
        assertEquals("full", visit(one, "TLSv1.3"));
    }

    @Test
    void afterTheEndTheServersServeOn() throws Exception {
        FleetTickets tickets = tickets("shop");
        SslContext server = serve(tickets, certificate);
        assertEquals("full", visit(server, "TLSv1.3"));
        tickets.close();
        assertEquals("full", visit(server, "TLSv1.3"));
    }

    @Test
    void wrongSettingsAreRefused() {
        assertThrows(ResumedException.class, () -> FleetTickets.builder(store.channel, "Shop", KEYRING));
        FleetTickets.Builder builder = FleetTickets.builder(store.channel, "shop", KEYRING);
        for (Duration wrong : List.of(Duration.ZERO, Duration.ofDays(8), Duration.ofMillis(1500))) {
            assertThrows(ResumedException.class, () -> builder.rotation(wrong));
            assertThrows(ResumedException.class, () -> builder.lifetime(wrong));
        }
    }

    private FleetTickets tickets(String namespace) throws Exception {
        return tickets(namespace, KEYRING);
    }

    private FleetTickets tickets(String namespace, Keyring keyring) throws Exception {
        FleetTickets tickets = FleetTickets.builder(store.channel, namespace, keyring).tls12(true).build();
        resources.add(tickets);
        assertTrue(tickets.awaitAgreement(PATIENCE));
        return tickets;
    }

    /** Returns the context of a server, whose connections are answered with "resumed" or "full". */
    private static SslContext serve(FleetTickets tickets, X509Bundle certificate) throws Exception {
        return tickets.newServerContext(certificate.toTempCertChainPem(), certificate.toTempPrivateKeyPem(), settings -> {});
    }

    /** Visits a server with one version of TLS, and returns its answer. The client keeps one session for all servers. */
    private String visit(SslContext server, String version) throws Exception {
        serving = server;
        Socket plain = new Socket("127.0.0.1", port);
        plain.setSoTimeout((int) PATIENCE.toMillis());
        try (SSLSocket socket = (SSLSocket) client.getSocketFactory().createSocket(plain, "localhost", port, true)) {
            socket.setEnabledProtocols(new String[] {version});
            socket.getOutputStream().write('?');
            String answer = new String(socket.getInputStream().readNBytes(8), StandardCharsets.US_ASCII).strip();
            socket.shutdownOutput();
            while (socket.getInputStream().read() >= 0) {} // JSSE forgets the session of a connection that is closed before
            return answer;
        }
    }

    private static X509Bundle certificateFor(String name) throws Exception {
        return new CertificateBuilder()
                .subject("CN=" + name)
                .addSanDnsName(name)
                .addSanDnsName("localhost")
                .setIsCertificateAuthority(true)
                .buildSelfSigned();
    }

    private static SSLContext trusting(X509Bundle... certificates) throws Exception {
        KeyStore store = KeyStore.getInstance("PKCS12");
        store.load(null, null);
        for (X509Bundle each : certificates) store.setCertificateEntry(each.getCertificate().getSubjectX500Principal().getName(), each.getCertificate());
        TrustManagerFactory trust = TrustManagerFactory.getInstance("PKIX");
        trust.init(store);
        SSLContext context = SSLContext.getInstance("TLS");
        context.init(null, trust.getTrustManagers(), null);
        return context;
    }

    private static final class Answer extends SimpleChannelInboundHandler<ByteBuf> {
        private final SslHandler tls;

        Answer(SslHandler tls) {
            this.tls = tls;
        }

        @Override
        protected void channelRead0(ChannelHandlerContext handler, ByteBuf request) {
            boolean resumed = SSL.isSessionReused(((ReferenceCountedOpenSslEngine) tls.engine()).sslPointer());
            handler.writeAndFlush(Unpooled.copiedBuffer(String.format("%-8s", resumed ? "resumed" : "full"), StandardCharsets.US_ASCII));
        }

        @Override
        public void exceptionCaught(ChannelHandlerContext handler, Throwable error) {
            handler.close();
        }
    }
}
