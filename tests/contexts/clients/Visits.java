import java.io.BufferedReader;
import java.io.FileInputStream;
import java.io.InputStreamReader;
import java.net.Socket;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import java.util.Arrays;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;

/**
 * Visits hosts in turn with JSSE, keeping sessions: java Visits.java PORT CA PKCS12 VERSION COUNT HOST...
 *
 * Prints a line for every 100 visits, and one "failed: ..." for each visit without an answer of status 200.
 */
public class Visits {
    public static void main(String[] arguments) throws Exception {
        int port = Integer.parseInt(arguments[0]), count = Integer.parseInt(arguments[4]);
        String[] hosts = Arrays.copyOfRange(arguments, 5, arguments.length);
        KeyStore trusted = KeyStore.getInstance("PKCS12"), own = KeyStore.getInstance("PKCS12");
        trusted.load(null, null);
        try (FileInputStream file = new FileInputStream(arguments[1])) {
            trusted.setCertificateEntry("ca", CertificateFactory.getInstance("X.509").generateCertificate(file));
        }
        try (FileInputStream file = new FileInputStream(arguments[2])) {
            own.load(file, "secret".toCharArray());
        }
        TrustManagerFactory trust = TrustManagerFactory.getInstance("PKIX");
        trust.init(trusted);
        KeyManagerFactory keys = KeyManagerFactory.getInstance("PKIX");
        keys.init(own, "secret".toCharArray());
        SSLContext context = SSLContext.getInstance("TLS");
        context.init(keys.getKeyManagers(), trust.getTrustManagers(), null);
        for (int visited = 1; visited <= count; visited++) {
            String host = hosts[visited % hosts.length];
            try {
                visit(context, port, host, "TLSv" + arguments[3]);
            } catch (Exception error) {
                System.out.println("failed: " + host + ": " + error);
            }
            if (visited % 100 == 0)
                System.out.println(visited);
        }
    }

    private static void visit(SSLContext context, int port, String host, String version) throws Exception {
        Socket plain = new Socket("127.0.0.1", port);
        plain.setSoTimeout(10_000);
        plain.setTcpNoDelay(true);
        try (SSLSocket socket = (SSLSocket) context.getSocketFactory().createSocket(plain, host, port, true)) {
            socket.setEnabledProtocols(new String[] {version});
            String request = "GET / HTTP/1.1\r\nHost: " + host + "\r\nUser-Agent: java\r\nConnection: close\r\n\r\n";
            socket.getOutputStream().write(request.getBytes("US-ASCII"));
            BufferedReader reader = new BufferedReader(new InputStreamReader(socket.getInputStream(), "US-ASCII"));
            String status = reader.readLine();
            if (status == null || !status.contains(" 200 "))
                throw new Exception("answer " + status);
            while (reader.readLine() != null)
                ; // to the end: JSSE forgets the session of a connection that is closed before
        }
    }
}
