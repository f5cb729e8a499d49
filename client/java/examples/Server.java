import io.github.resumed.netty.FleetTickets;
import io.github.resumed.netty.Keyring;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
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
import java.io.File;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.util.HashMap;
import java.util.Map;

/**
 * A TLS server of a fleet, in Netty: {@code Server --chain FILE --key FILE --target HOST:PORT --namespace NAME --keyring FILE}.
 *
 * <p>It prints its port of 127.0.0.1 once it has ticket keys, and answers whatever a client sends with "resumed" or "full".
 */
public final class Server {
    public static void main(String[] arguments) throws Exception {
        Map<String, String> options = new HashMap<>(Map.of("--port", "0"));
        for (int index = 0; index + 1 < arguments.length; index += 2) options.put(arguments[index], arguments[index + 1]);
        // To a store on another machine: TlsChannelCredentials, with a client certificate.
        ManagedChannel channel = Grpc.newChannelBuilder(options.get("--target"), InsecureChannelCredentials.create()).build();
        FleetTickets tickets =
                FleetTickets.builder(channel, options.get("--namespace"), Keyring.load(Path.of(options.get("--keyring")))).tls12(true).build();
        SslContext context = tickets.newServerContext(new File(options.get("--chain")), new File(options.get("--key")), settings -> {});
        ServerBootstrap server =
                new ServerBootstrap()
                        .group(new MultiThreadIoEventLoopGroup(1, NioIoHandler.newFactory()))
                        .channel(NioServerSocketChannel.class)
                        .childHandler(new Connection(context));
        if (!tickets.awaitAgreement(Duration.ofSeconds(10))) System.err.println("no ticket keys yet: connections are full handshakes");
        Channel listener = server.bind("127.0.0.1", Integer.parseInt(options.get("--port"))).sync().channel();
        System.out.println(((InetSocketAddress) listener.localAddress()).getPort());
        Runtime.getRuntime().addShutdownHook(new Thread(tickets::close));
        listener.closeFuture().sync();
    }

    private static final class Connection extends ChannelInitializer<SocketChannel> {
        private final SslContext context;

        Connection(SslContext context) {
            this.context = context;
        }

        @Override
        protected void initChannel(SocketChannel connection) {
            SslHandler tls = context.newHandler(connection.alloc());
            connection.pipeline().addLast(tls, new SimpleChannelInboundHandler<ByteBuf>() {
                @Override
                protected void channelRead0(ChannelHandlerContext handler, ByteBuf request) {
                    boolean resumed = SSL.isSessionReused(((ReferenceCountedOpenSslEngine) tls.engine()).sslPointer());
                    handler.writeAndFlush(Unpooled.copiedBuffer(resumed ? "resumed\n" : "full\n", StandardCharsets.US_ASCII));
                }

                @Override
                public void exceptionCaught(ChannelHandlerContext handler, Throwable error) {
                    handler.close(); // clients may leave as they like
                }
            });
        }
    }
}
