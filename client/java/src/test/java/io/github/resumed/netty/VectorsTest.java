package io.github.resumed.netty;

import static io.github.resumed.netty.Vectors.bytes;
import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;

import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import io.netty.handler.ssl.OpenSslSessionTicketKey;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HexFormat;
import java.util.List;
import java.util.Optional;
import java.util.stream.StreamSupport;
import org.junit.jupiter.api.Test;

class VectorsTest {
    @Test
    void ticketSecretsHaveTheAddressesAndKeysOfTheContract() throws Exception {
        for (JsonObject vector : Vectors.read("tickets.json", "secrets")) {
            FleetKey key = new FleetKey(bytes(vector, "key"));
            Epoch epoch =
                    new Epoch(vector.get("start").getAsLong(), vector.get("rotation").getAsInt(), vector.get("generation").getAsInt());
            long notAfter = epoch.notAfter(vector.get("lifetime").getAsLong());
            String namespace = vector.get("namespace").getAsString();
            long created = vector.get("created_microseconds").getAsLong();
            TicketSecret secret = new TicketSecret(namespace, key, epoch, bytes(vector, "secret"), created, notAfter);
            assertArrayEquals(bytes(vector, "address"), secret.address());
            assertArrayEquals(bytes(vector, "plaintext"), secret.encode());
            assertArrayEquals(bytes(vector, "sealed"), key.seal(secret.address(), secret.encode(), notAfter, bytes(vector, "nonce")));
            assertArrayEquals(bytes(vector, "name"), secret.name());
            byte[] raw48 = bytes(vector, "raw48");
            assertArrayEquals(raw48, secret.raw48());
            OpenSslSessionTicketKey ticketKey = secret.ticketKey();
            assertArrayEquals(raw48, Crypto.concat(ticketKey.name(), ticketKey.hmacKey(), ticketKey.aesKey()));
            FleetKey.Opened opened = key.open(secret.address(), bytes(vector, "sealed")).orElseThrow();
            assertArrayEquals(secret.raw48(), TicketSecret.decode(namespace, key, epoch, opened).orElseThrow().raw48());
        }
    }

    @Test
    void valuesOpenThatAnyLanguageHasSealed() throws Exception {
        for (JsonObject vector : Vectors.read("sealing.json", "opens")) {
            FleetKey key = new FleetKey(bytes(vector, "key"));
            byte[] sealed = bytes(vector, "sealed");
            long notAfter = vector.get("not_after").getAsLong();
            assertArrayEquals(sealed, key.seal(bytes(vector, "store_key"), bytes(vector, "plaintext"), notAfter, bytes(vector, "nonce")));
            assertArrayEquals(bytes(vector, "plaintext"), key.open(bytes(vector, "store_key"), sealed).orElseThrow().plaintext());
        }
    }

    @Test
    void noOtherValueOpens() throws Exception {
        List<FleetKey> keys = keyring();
        for (JsonObject vector : Vectors.read("sealing.json", "does_not_open")) {
            byte[] sealed = bytes(vector, "sealed");
            long now = vector.get("now").getAsLong();
            Optional<FleetKey.Opened> opened =
                    keys.stream()
                            .filter(key -> key.sealed(sealed))
                            .findFirst()
                            .flatMap(key -> key.open(bytes(vector, "store_key"), sealed))
                            .filter(value -> now < value.notAfter());
            assertFalse(opened.isPresent(), vector.get("case").getAsString());
        }
    }

    private static List<FleetKey> keyring() throws Exception {
        String text = Files.readString(Path.of(System.getProperty("vectors"), "sealing.json"));
        var keys = JsonParser.parseString(text).getAsJsonObject().getAsJsonArray("keyring");
        return StreamSupport.stream(keys.spliterator(), false)
                .map(key -> new FleetKey(HexFormat.of().parseHex(key.getAsString())))
                .toList();
    }
}
