package io.github.resumed.netty;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HexFormat;
import java.util.List;

/** The vectors that all languages replay: protos/vectors. */
final class Vectors {
    private Vectors() {}

    static List<JsonObject> read(String file, String name) throws IOException {
        String text = Files.readString(Path.of(System.getProperty("vectors"), file));
        JsonArray all = JsonParser.parseString(text).getAsJsonObject().getAsJsonArray(name);
        return all.asList().stream().map(JsonElement::getAsJsonObject).toList();
    }

    static byte[] bytes(JsonObject vector, String name) {
        return HexFormat.of().parseHex(vector.get(name).getAsString());
    }
}
