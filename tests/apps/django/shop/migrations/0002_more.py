from django.db import migrations, models
class Migration(migrations.Migration):
    dependencies = [("shop", "0001_initial")]
    operations = [
        migrations.AddField("book", "price", models.DecimalField(max_digits=8, decimal_places=2, default="9.50")),
        migrations.AddField("writer", "born", models.DateField(null=True)),
        migrations.AddIndex("book", models.Index(fields=["title"], name="title_idx")),
    ]
